"""Adapters on 4- and 8-bit bases; runs where bitsandbytes is installed."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lotr import LotrConfig
from tuner_contract import linears

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("default")

KINDS = {
    8: lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    4: lambda: bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"),
}


def base(bits: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        layer = KINDS[bits]()
        layer.load_state_dict(nn.Linear(64, 64).state_dict())
        layers.append(layer)
    return nn.Sequential(*layers).to("cpu")


ROWS = ["lotr", "dora", "bora", "map", "lora", "metatt_4d"]


def adapted(bits: int, row: str, **kwargs: bool) -> PeftModel:
    config = LotrConfig(method=row, r=4, target_modules=["0", "1"], seed=0, **kwargs)
    model = get_peft_model(base(bits), config)
    for name, number in model.named_parameters():
        if name.endswith("beta") and "init_weights" in kwargs:
            nn.init.ones_(number)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("bits", KINDS)
def test_step_0_equals_the_quantised_base(bits: int, row: str, x: Tensor) -> None:
    plain = base(bits)
    plain(x)  # the first call quantises
    assert torch.equal(adapted(bits, row)(x), plain(x))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("bits", KINDS)
def test_the_adapter_on_a_quantised_base_gets_gradients(bits: int, row: str, x: Tensor) -> None:
    model = adapted(bits, row, init_weights=False)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("bits, rounding", [(8, 0.03), (4, 0.2)])
def test_merging_is_exact_to_the_quantisation_and_unmerging_exactly(
    bits: int, rounding: float, row: str, x: Tensor
) -> None:
    model = adapted(bits, row, init_weights=False)
    unmerged = model(x)
    layer = next(linears(model))
    before = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(layer.get_base_layer().weight, before)
    assert (model(x) - unmerged).abs().max() < rounding * unmerged.abs().max()
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)
    assert torch.equal(model(x), unmerged)
