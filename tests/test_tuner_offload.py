"""An adapter on a base model whose weights lie on disk until a module runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import LlamaForCausalLM

from conftest import llama, tokens
from lotr import LotrConfig, PlanError
from tuner_contract import outputs

INPUTS = {"input_ids": tokens()}
MAP = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
       "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "disk"}  # fmt: skip


@pytest.fixture
def offloaded(tmp_path: Path) -> nn.Module:
    llama().save_pretrained(tmp_path / "base")
    folder = tmp_path / "offload"
    return LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=MAP, offload_folder=folder).eval()


def config(**fields: object) -> LotrConfig:
    return LotrConfig(r=4, target_modules=["q_proj", "v_proj"], seed=0, **fields)


@pytest.mark.parametrize("magnitude", ["none", "per_output"])
def test_step_0_is_the_base_and_every_number_trains(magnitude: str, offloaded: nn.Module) -> None:
    model = get_peft_model(offloaded, config(magnitude=magnitude)).eval()
    torch.testing.assert_close(outputs(model, INPUTS), outputs(llama(), INPUTS), atol=1e-6, rtol=1e-6)
    model.train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and not any(p.is_meta or p.grad is None for p in trained)


def test_an_adapter_of_a_whole_model_answers_the_same_on_an_offloaded_one(
    offloaded: nn.Module, tmp_path: Path
) -> None:
    whole = get_peft_model(llama(), config(init_weights=False)).eval()
    whole.save_pretrained(tmp_path / "adapter")
    with pytest.raises(PlanError, match=r"get_peft_model.*set_peft_model_state_dict"):
        PeftModel.from_pretrained(offloaded, tmp_path / "adapter", offload_folder=tmp_path / "more")
    again = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=MAP, offload_folder=tmp_path / "offload"
    )
    model = get_peft_model(again, LotrConfig.from_pretrained(tmp_path / "adapter")).eval()
    set_peft_model_state_dict(model, load_peft_weights(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(model, INPUTS), outputs(whole, INPUTS), atol=1e-6, rtol=1e-6)
    model.load_adapter(tmp_path / "adapter", adapter_name="second")
    model.set_adapter("second")
    torch.testing.assert_close(outputs(model, INPUTS), outputs(whole, INPUTS), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("magnitude", ["none", "per_output"])
def test_a_saved_adapter_loads_on_a_base_with_a_device_map_of_memory_alone(
    magnitude: str, tmp_path: Path
) -> None:
    whole = get_peft_model(llama(), config(magnitude=magnitude, init_weights=False)).eval()
    whole.save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(outputs(model, INPUTS), outputs(whole, INPUTS))
