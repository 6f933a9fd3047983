"""Adapters on a base of torchao's int8 weights; runs where torchao is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, TorchAoConfig

from conftest import llama, tokens
from lotr import ConfigError, LotrConfig
from tuner_contract import outputs, weights

quantization = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.filterwarnings("default")
INPUTS = {"input_ids": tokens()}
Make = Callable[[], nn.Module]


def bare() -> nn.Module:
    model = llama()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.fixture
def of_transformers(tmp_path: Path) -> Make:
    llama().save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.fixture(params=["bare", "of_transformers"])
def make(request: pytest.FixtureRequest, of_transformers: Make) -> Make:
    return bare if request.param == "bare" else of_transformers


def adapted(model: nn.Module, **fields: Any) -> PeftModel:
    start = {"r": 4, "target_modules": ["q_proj", "v_proj"], "seed": 0, "init_weights": False}
    return get_peft_model(model, LotrConfig(**(start | fields))).eval()


@pytest.mark.parametrize("method", ["lotr", "dora", "metatt_4d"])
def test_step_0_is_the_quantised_base_and_every_number_trains(make: Make, method: str) -> None:
    model = adapted(make(), method=method, init_weights=None)
    assert torch.equal(outputs(model, INPUTS), outputs(make(), INPUTS))
    model = adapted(make(), method=method).train()
    model(**INPUTS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_factors_can_start_from_quantised_weights(make: Make) -> None:
    model = adapted(make(), method="lora_xs", init_weights=None)
    torch.testing.assert_close(outputs(model, INPUTS), outputs(make(), INPUTS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["lotr", "dora", "metatt_4d"])
def test_merging_rounds_to_int8_and_unmerging_is_exact(of_transformers: Make, method: str) -> None:
    model = adapted(of_transformers(), method=method)
    unmerged, before = outputs(model, INPUTS), [w.dequantize() for w in weights(model)]
    model.merge_adapter()
    assert (outputs(model, INPUTS) - unmerged).abs().max() < 0.02 * unmerged.abs().max()
    after = [w.dequantize() for w in weights(model)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.unmerge_adapter()
    assert torch.equal(outputs(model, INPUTS), unmerged)


def test_what_nothing_can_quantise_again_is_not_merged() -> None:
    model = adapted(bare())
    expected = outputs(model, INPUTS)
    with pytest.raises(ConfigError, match="A weight of torchao cannot be merged here"):
        model.merge_adapter()
    assert torch.equal(outputs(model, INPUTS), expected)
