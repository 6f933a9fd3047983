"""Adapters on 4- and 8-bit bases, every row, core and magnitude; runs where bitsandbytes is installed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import llama, tokens
from lotr import METHODS, LotrConfig, PlanError
from lotr.math.cores import CORES
from lotr.math.magnitude import MAGNITUDES
from lotr.tuner.layer import LotrLinear
from lotr.tuner.weight import base_weight
from tuner_contract import outputs

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("default")

INPUTS = {"input_ids": tokens()}
KINDS: dict[int, Any] = {
    8: lambda out, width: bnb.nn.Linear8bitLt(width, out, bias=False, has_fp16_weights=False),
    4: lambda out, width: bnb.nn.Linear4bit(
        width, out, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    ),
}
CASES = {row: {"method": row} for row in METHODS} | {
    f"{core}-{magnitude}": {
        "modes": () if core == "identity" else ("layer", "projection"),
        "zero": "output" if core == "identity" else "core",
        "core": core,
        "magnitude": magnitude,
    }
    for core, magnitude in itertools.product(CORES, MAGNITUDES)
}


def quantised(bits: int, weight: Tensor) -> nn.Module:
    layer = KINDS[bits](*weight.shape)
    layer.load_state_dict({"weight": weight})
    layer.to("cpu")
    layer(torch.zeros(1, weight.shape[1]))  # the first call quantises
    return layer


def base(bits: int | None) -> nn.Module:
    model = llama()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head" and bits is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, quantised(bits, module.weight.detach()))
    return model


@pytest.fixture(params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def adapted(model: nn.Module, case: dict[str, Any], random: bool = True) -> PeftModel:
    """Return an adapter as it starts, or with an update that is not zero."""
    config = LotrConfig(**case, r=4, target_modules=["q_proj", "v_proj", "down_proj"], seed=0)
    by_norm = MAGNITUDES[str(config.magnitude)].divides_by_update
    config.init_weights = False if random and not by_norm else None
    model = get_peft_model(model, config).eval()
    for name, number in model.named_parameters():
        if random and name.endswith("beta"):  # the size of an update that is divided by its norm
            nn.init.ones_(number)
    return model


def adapted_layers(model: PeftModel) -> dict[str, LotrLinear]:
    named = model.base_model.model.named_modules()
    return {path: module for path, module in named if isinstance(module, LotrLinear)}


def codes(layer: LotrLinear) -> Tensor:
    return layer.get_base_layer().weight.detach().clone()


def test_step_0_is_the_quantised_base(bits: int, case: dict[str, Any]) -> None:
    """In training mode: in evaluation bitsandbytes has other kernels for a base without an adapter."""
    model, plain = adapted(base(bits), case, random=False).train(), base(bits).train()
    result, expected = outputs(model, INPUTS), outputs(plain, INPUTS)
    if case.get("method") == "lora_xs":  # starts at a deviation of 1e-5
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    else:
        assert torch.equal(result, expected)


def test_every_number_gets_a_gradient_also_after_an_evaluation(bits: int, case: dict[str, Any]) -> None:
    model = adapted(base(bits), case)
    outputs(model, INPUTS)
    model.train()
    model(**INPUTS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_4_bit_base_that_was_packed_for_evaluation_is_refused() -> None:
    layer = quantised(4, torch.randn(64, 64)).eval()
    layer(torch.zeros(1, 64))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this processor")
    with pytest.raises(PlanError, match="has packed the 4-bit weight of '0'"):
        get_peft_model(nn.Sequential(layer), LotrConfig(r=4, target_modules=["0"]))


@pytest.mark.parametrize("size", ["as it starts", "of the weight"])
def test_merging_gives_the_layer_that_quantises_the_sum_and_unmerging_the_layer_before(
    bits: int, case: dict[str, Any], size: str
) -> None:
    """The sum is that of the same adapter on a base of the dequantised weights.

    An update smaller than half a step of the codes leaves them as they are, so it is lost: at 4 bits that is so for
    `lora_xs`, `moslora` and `fact_tk` as they start here.
    """
    model, plain = adapted(base(bits), case), base(None)
    layers = adapted_layers(model)
    with torch.no_grad():
        for path, layer in layers.items():
            plain.get_submodule(path).weight.copy_(base_weight(layer))
    dense = adapted(plain, case)
    dense.load_state_dict({n: p for n, p in model.state_dict().items() if "lotr_" in n}, strict=False)
    if size == "of the weight":
        layer = next(iter(layers.values()))
        larger = base_weight(layer).norm() / layer.get_delta_weight("default").norm()
        for each in (model, dense):
            next(iter(adapted_layers(each).values())).scaling["default"] *= (
                larger.item()
            )  # one for the whole model

    unmerged, before = outputs(model, INPUTS), {path: codes(layer) for path, layer in layers.items()}
    model.merge_adapter()
    dense.merge_adapter()
    for path, layer in layers.items():
        of_sum = quantised(bits, dense.base_model.model.get_submodule(path).get_base_layer().weight.detach())
        assert torch.equal(base_weight(layer.get_base_layer()), base_weight(of_sum)), path
        if size == "of the weight":
            assert not torch.equal(codes(layer), before[path]), path
    model.unmerge_adapter()
    assert all(torch.equal(codes(layer), before[path]) for path, layer in layers.items())
    assert torch.equal(outputs(model, INPUTS), unmerged)
