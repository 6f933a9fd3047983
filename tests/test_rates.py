"""Every part of an adapter trains at the rate that was named for it, or at the one it starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import bert, tokens
from lotr import LotrConfig, parameter_groups
from lotr.errors import ConfigError


def _adapted(config: PeftConfig, decoder: bool = False) -> PeftModel:
    if not decoder:
        return get_peft_model(bert(), config)
    config.target_modules = ["q_proj", "v_proj"]
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), config)


def _rates(model: PeftModel, **named: float) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in parameter_groups(model, **named)}


def test_named_rates_reach_cores_factors_and_head() -> None:
    model = _adapted(LotrConfig(r=2, task_type="SEQ_CLS"))
    groups = parameter_groups(model, lr=1.0, core_lr=2.0, head_lr=3.0)
    assert {g["name"]: g["lr"] for g in groups} == {"factors": 1.0, "cores": 2.0, "head": 3.0}
    assert {tuple(p.shape) for g in groups if g["name"] == "cores" for p in g["params"]} == {(2, 2)}
    grouped = sum(p.numel() for g in groups for p in g["params"])
    assert grouped == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert _rates(model, lr=1.0) == {"factors": 1.0, "cores": 1.0, "head": 1.0}
    assert _rates(model, core_lr=2.0) == {"factors": 3e-3, "cores": 2.0, "head": 3e-2}


@pytest.mark.parametrize(
    ("fields", "decoder", "rates"),
    [
        ({}, False, {"factors": 3e-3, "cores": 1e-2}),
        ({}, True, {"factors": 1e-2, "cores": 1e-2}),
        ({"r": (16, 32)}, True, {"factors": 1e-2, "cores": 5e-3}),
        ({"rank_pattern": {"v_proj": 32}}, True, {"factors": 1e-2, "cores": 5e-3}),
        ({"r": 32, "scaling": 4.0}, True, {"factors": 1e-2, "cores": 1.25e-3}),
        ({"r": 512}, True, {"factors": 1e-2, "cores": 5e-3}),  # cut to 32
        ({"r": 32, "trainable": "cores", "init": "orthonormal"}, False, {"cores": 1e-2}),
        ({"r": 8, "trainable": "cores", "init": "orthonormal"}, True, {"cores": 2e-2}),
        ({"method": "lora_xs"}, False, {"cores": 2e-2}),
        ({"init": "gaussian", "alpha": 1.0}, False, {"factors": 3e-3, "cores": 1e-2}),
        ({"zero": "output", "scaling": 2.0}, False, {"factors": 3e-3, "cores": 1e-2}),
        ({"method": "tenslora_depth", "scaling": 2.0}, True, {"factors": 1e-2, "cores": 1e-2}),
        ({"method": "lorta", "r": 16}, True, {"factors": 1e-2, "cores": 1e-2}),
        ({"method": "metatt_4d"}, True, {"factors": 1e-2, "cores": 3e-3}),
        ({"method": "map", "scaling": None}, False, {"factors": 3e-3, "magnitudes": 1e-1}),
        ({"method": "dora"}, True, {"factors": 1e-2, "magnitudes": 3e-3}),
        ({"modules_to_save": ["lm_head"]}, True, {"factors": 1e-2, "cores": 1e-2, "head": 1e-4}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*rank", "ignore:LoRA")
def test_parts_without_a_rate_start_from_those_that_worked(
    fields: dict[str, Any], decoder: bool, rates: dict[str, float]
) -> None:
    assert _rates(_adapted(LotrConfig(**{"r": 16, **fields}), decoder)) == pytest.approx(rates)


def test_peft_s_own_lora_has_one_rate() -> None:
    assert _rates(_adapted(LoraConfig(r=2), decoder=True)) == {"factors": 1e-2}


def test_where_no_rate_is_known_one_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="needs lr"):
        parameter_groups(bert())
    model = _adapted(LotrConfig(r=2), decoder=True)
    model.add_adapter("other", LotrConfig(r=2, method="metatt_4d", target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"default.*other.*Name lr"):
        parameter_groups(model)
    assert _rates(model, lr=1.0) == {"factors": 1.0, "cores": 1.0}


def test_with_rates_to_start_from_the_scaling_of_zero_cores_changes_nothing() -> None:
    updates = []
    for scaling in (1.0, 16.0):
        model = _adapted(LotrConfig(r=4, scaling=scaling)).double()
        optimizer = torch.optim.AdamW(parameter_groups(model), weight_decay=0.0, eps=1e-15)
        for _ in range(20):
            model(tokens()).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = (module for module in model.modules() if hasattr(module, "get_delta_weight"))
        updates.append([layer.get_delta_weight("default") for layer in layers])
    for one, other in zip(*updates, strict=True):
        assert one.norm() > 0.1
        torch.testing.assert_close(one, other)
