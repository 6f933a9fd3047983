"""Magnitudes on real modules, with every core and way of sharing beside the rows of the table."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import conftest
from conftest import gpt2, tokens
from dense_truth import rescaled, weight_of
from lotr import LotrConfig
from lotr.math.magnitude import MAGNITUDES
from lotr.tuner.group import LotrGroup, LotrLayer
from lotr.tuner.layer import LotrLinear
from tuner_contract import linears, outputs, weights

INPUTS = {"input_ids": tokens()}
bert = partial(conftest.bert, num_hidden_layers=2)
SCALED = [name for name in MAGNITUDES if name != "none"]
SHARING = ["lora", "lotr", "lotr_joint", "tenslora_qkv_depth", "lorta", "metatt_5d", "fact_tt", "lora_xs"]


def config(row: str = "lotr", magnitude: str = "per_output", seed: int = 0, **kwargs: Any) -> LotrConfig:
    scaling = 1.0 if MAGNITUDES[magnitude].divides_by_update else 1.5  # which would cancel it
    zero = "core" if row == "lora_xs" else None  # which starts at random cores
    defaults = {"r": 4, "scaling": scaling, "zero": zero, "target_modules": ["query", "value", "dense"]}
    return LotrConfig(method=row, magnitude=magnitude, seed=seed, **(defaults | kwargs))


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move every trained number away from where it starts."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator).to(p)
            p += 0.2 * noise * p.abs().clamp_min(0.5) if "lotr_magnitude" in name else 0.2 * noise


def stirred(base: nn.Module, settings: LotrConfig) -> PeftModel:
    model = get_peft_model(base, settings)
    stir(model)
    return model.eval()


#: Every way of sharing under the widest magnitude; every magnitude over trained factors and over frozen ones.
CASES = [
    *((row, "per_output_and_input") for row in SHARING),
    *itertools.product(("lotr", "lora_xs"), SCALED[::2]),
]


@pytest.fixture(params=CASES, ids="-".join)
def settings(request: pytest.FixtureRequest) -> LotrConfig:
    return config(*request.param)


# ---- any core, any sharing


def test_step_0_is_the_base_and_training_lowers_the_loss(settings: LotrConfig) -> None:
    model = get_peft_model(bert(), settings).eval()
    assert torch.equal(outputs(model, INPUTS), outputs(bert(), INPUTS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**INPUTS, labels=torch.arange(4) % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_merged_equals_unmerged(settings: LotrConfig) -> None:
    model = stirred(bert(), settings)
    unmerged, before = outputs(model, INPUTS), weights(model)
    assert (unmerged - outputs(bert(), INPUTS)).abs().max() > 1e-3
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(model, INPUTS), unmerged, atol=2e-6, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_each_row_of_a_mixed_batch_uses_its_own_adapter(settings: LotrConfig) -> None:
    model = get_peft_model(bert(), settings, adapter_name="scaled")
    stir(model)
    model.add_adapter("plain", config("lotr", "none", seed=1, init_weights=False))
    model.add_adapter("other", config("lora", "per_output", seed=2, init_weights=False))
    model.eval()
    names, alone = ["other", "scaled", "__base__", "plain"], {"__base__": outputs(bert(), INPUTS)}
    for name in ("scaled", "plain", "other"):
        model.set_adapter(name)
        alone[name] = outputs(model, INPUTS)
    mixed = outputs(model, INPUTS, adapter_names=names)
    expected = torch.stack([alone[name][n] for n, name in enumerate(names)])
    torch.testing.assert_close(mixed, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("first", SCALED)
@pytest.mark.parametrize("second", list(MAGNITUDES))
def test_two_active_adapters_add_up_what_each_would_change(first: str, second: str) -> None:
    model = get_peft_model(bert(), config("lotr", first), adapter_name="a")
    stir(model)
    model.add_adapter("b", config("lora", second, seed=1))
    model.set_adapter("b")
    stir(model)
    x = torch.randn(2, 5, 32)
    layer = next(linears(model))

    def change(*names: str) -> Tensor:
        layer.set_adapter(list(names))
        with torch.no_grad():
            return layer(x) - layer.base_layer(x)

    both = change("a", "b")
    torch.testing.assert_close(both, change("a") + change("b"), atol=2e-6, rtol=1e-5)
    assert change("a").abs().max() > 1e-2 < change("b").abs().max()
    layer.set_adapter(["a", "b"])
    untouched = layer.base_layer(x).detach()
    layer.merge()
    torch.testing.assert_close(layer(x) - untouched, both, atol=2e-6, rtol=1e-5)


# ---- gradients


@pytest.mark.parametrize("norm_gradient", [False, True])
def test_gradients_are_those_of_the_dense_formula(settings: LotrConfig, norm_gradient: bool) -> None:
    """In float64, to rounding; norms are constants unless asked for."""
    settings.norm_gradient = norm_gradient
    model = stirred(bert(), settings).double()
    x = torch.randn(3, 32, dtype=torch.float64)
    for layer in list(linears(model))[:2]:
        own = [layer, *(group for _, group in layer.adapters["default"].parts)]
        numbers = [p for m in own for p in m.parameters() if p.requires_grad]

        W, bias = layer.base_layer.weight, layer.base_layer.bias
        dW = layer.update("default", torch.eye(32, dtype=torch.float64)).T
        magnitude = dict(layer.lotr_magnitude["default"].named_parameters())
        adapted = rescaled(W, dW, str(settings.magnitude), magnitude, constant=not norm_gradient)
        dense = x @ adapted.T + bias
        torch.testing.assert_close(layer(x), dense, rtol=1e-9, atol=1e-10)
        expected = torch.autograd.grad(dense.sin().sum(), numbers)
        found = torch.autograd.grad(layer(x).sin().sum(), numbers)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("magnitude", SCALED)
def test_a_constant_norm_gives_other_gradients_than_one_that_is_not(magnitude: str) -> None:
    found = []
    for norm_gradient in (False, True):
        model = stirred(bert(), config("lotr", magnitude, norm_gradient=norm_gradient))
        model(**INPUTS).logits.square().sum().backward()
        found.append(
            next(m for m in model.modules() if isinstance(m, LotrGroup)).lotr_U["default"].weight.grad
        )
    assert (found[0] - found[1]).abs().max() > 0.01 * found[0].abs().max()


# ---- half precision, and weights that change under the adapter


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("magnitude", SCALED)
@pytest.mark.parametrize("base", [bert, gpt2])
def test_on_a_half_precision_base_step_0_is_exact_and_magnitudes_are_float32(
    base: Any, magnitude: str, wide: bool
) -> None:
    targets = ["query", "value"] if base is bert else ["c_attn", "c_proj"]
    settings = config("lora", magnitude, target_modules=targets)
    model = get_peft_model(base().bfloat16(), settings, autocast_adapter_dtype=wide).eval()
    assert torch.equal(outputs(model, INPUTS), outputs(base().bfloat16(), INPUTS))
    kept = {p.dtype for n, p in model.named_parameters() if "lotr_magnitude" in n}
    factors = {p.dtype for n, p in model.named_parameters() if "lotr_U" in n}
    assert kept == {torch.float32} and factors == {torch.float32 if wide else torch.bfloat16}


def _dense(layer: LotrLinear, magnitude: str, x: Tensor) -> Tensor:
    numbers = dict(layer.lotr_magnitude["default"].named_parameters())
    dW = layer.update("default", torch.eye(layer.in_features, dtype=x.dtype)).T
    return x @ rescaled(weight_of(layer.base_layer), dW, magnitude, numbers).T + layer.base_layer.bias


@pytest.mark.parametrize("row", ["lotr", "lora_xs"])
@pytest.mark.parametrize("magnitude", SCALED)
@torch.no_grad()
def test_the_norms_follow_a_base_weight_that_is_loaded_anew_or_changes_its_type(
    row: str, magnitude: str
) -> None:
    model = stirred(bert(), config(row, magnitude))
    x = torch.randn(3, 32)
    layer = next(linears(model))
    before = layer(x)  # norms are kept from here on

    state = {
        k: v + 0.1 * torch.randn_like(v) if k.endswith("base_layer.weight") else v
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    torch.testing.assert_close(layer(x), _dense(layer, magnitude, x), atol=2e-6, rtol=1e-5)
    assert (layer(x) - before).abs().max() > 1e-2

    model.to(torch.float64)
    exact = _dense(layer, magnitude, x.double())
    torch.testing.assert_close(layer(x.double()), exact, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("magnitude", SCALED)
def test_a_model_that_moves_keeps_the_norms_that_its_magnitudes_started_at(magnitude: str) -> None:
    """Computed anew elsewhere, they could differ in their last bit, and step 0 would not be the base."""
    layer = next(linears(get_peft_model(bert(), config("lotr", magnitude))))
    before = layer.base_weight.row_energy()
    layer.to("cpu")
    assert layer.base_weight.cache["row_energy"] is before
    layer.double()
    assert not layer.base_weight.cache


# ---- an update of zero


@pytest.mark.parametrize("norm_gradient", [False, True])
def test_an_update_that_passes_through_zero_keeps_everything_finite(norm_gradient: bool) -> None:
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    options = {"target_modules": ["0", "2"], "r": 2, "norm_gradient": norm_gradient}
    model = get_peft_model(base, config("map", "base_and_update", **options))
    x, labels = torch.randn(32, 12), torch.arange(32) % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    groups = [m for m in model.modules() if isinstance(m, LotrGroup)]
    losses = []
    for step in range(120):
        if step == 30:
            for group in groups:
                nn.init.zeros_(group.lotr_U["default"].weight)
        if step == 60:
            for p in (p for g in groups for p in g.parameters()):
                nn.init.zeros_(p)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad), step
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0] and torch.tensor(losses).isfinite().all()
    merged = model.merge_and_unload(safe_merge=True)
    assert not [m for m in merged.modules() if isinstance(m, LotrLayer)]


def test_norms_follow_frozen_factors_that_are_loaded() -> None:
    options = {"trainable": "cores", "init_weights": False, "init": "orthonormal"}
    source, model = (get_peft_model(bert(), config(seed=seed, **options)).eval() for seed in (1, 0))
    outputs(model, {"input_ids": tokens()})
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    found, expected = (outputs(m, {"input_ids": tokens()}) for m in (model, source))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_change_of_an_input_norm_too_small_for_bfloat16_is_seen_in_the_product() -> None:
    model = get_peft_model(bert().to(torch.bfloat16), config("bora", "per_output_and_input")).eval()
    layer = next(m for m in model.modules() if isinstance(m, LotrLinear))
    x = torch.randn(64, layer.in_features).to(torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        layer.lotr_magnitude["default"].m_in *= 1.003  # rounded to bfloat16 this is one
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("magnitude", ["none", "per_output", "per_output_and_input", "base_and_update"])
def test_a_model_made_on_the_meta_device_can_be_given_memory(magnitude: str) -> None:
    def made(seed: int) -> nn.Module:
        base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 6))
        return get_peft_model(base, config("lora_xs", magnitude, seed=seed, target_modules=["0", "2"]))

    with torch.device("meta"):
        model = made(seed=0)
        model(torch.empty(2, 12))
    model.to_empty(device="cpu")
    reference, x = made(seed=1), torch.randn(5, 12)
    model.load_state_dict(reference.state_dict())
    torch.testing.assert_close(model(x), reference(x), atol=1e-6, rtol=1e-5)
