"""What a configuration names and a model lacks is an error, and so is a weight that is read without its module."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import Llama4TextConfig, MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router

from conftest import SIZES, VOCABULARY, bert, llama, pico, tokens
from lotr import LotrConfig, PlanError, plan
from lotr.training.adapter import add_adapter
from lotr.tuner.group import LotrLayer
from moe_models import qwen
from tuner_contract import outputs


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_modules": ["query", "vlue"]}, r"target_modules='vlue' .* Near matches: value\."),
        ({"target_modules": ["self.query", "self.vlue"]}, r"'self\.vlue' .* Near matches: self\.value"),
        ({"target_modules": r".*\.querry"}, r"whole path, such as"),
        ({"modules_to_save": ["clasifier"]}, r"modules_to_save='clasifier' .* Near matches: classifier"),
        ({"exclude_modules": ["poler"]}, r"exclude_modules='poler' .* Near matches: pooler"),
        ({"exclude_modules": r"poler\..*"}, r"exclude_modules='poler.*whole path"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform=7 is no layer .* Known: 0, 1, 2\."),
        ({"layers_to_transform": 3}, r"layers_to_transform=3 is no layer"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0, 7]},
            r"layers_to_transform=7 is no layer",
        ),
        ({"trainable_token_indices": {"word_embedings": [1]}}, r"'word_embedings' .* word_embeddings"),
        (
            {"target_modules": ["query", "pooler.dense"], "layers_to_transform": [0]},
            r"target_modules='pooler\.dense' matches no module of the layers",
        ),
        (
            {"layers_to_transform": [0], "layers_pattern": "layers"},
            r"layers_pattern='layers' names no list .* Near matches: layer\.",
        ),
        ({"rank_pattern": {"vlue": 2}}, r"rank_pattern='vlue' matches no adapted module .* value\."),
        ({"rank_pattern": {"key": 2}}, r"rank_pattern='key' matches no adapted module"),
    ],
    ids=str,
)
def test_a_name_that_matches_nothing_is_an_error_with_near_matches(fields: Any, message: str) -> None:
    config = LotrConfig(**({"r": 2, "target_modules": ["query", "value"]} | fields))
    model = bert()
    for attempt in (lambda: plan(model, config), lambda: get_peft_model(model, config)):
        with pytest.raises(PlanError, match=message):
            attempt()
    assert not [m for m in model.modules() if isinstance(m, LotrLayer)]


def test_all_linear_stays_in_the_layers_that_are_named() -> None:
    config = LotrConfig(r=2, target_modules="All-Linear", layers_to_transform=[1])
    for make in (bert, qwen):
        paths = [target.path for target in plan(make(), config).targets]
        assert len(paths) == 6 and all(".1." in path for path in paths)


def test_names_that_experts_have_are_mapped_before_they_are_checked() -> None:
    config = LotrConfig(r=2, target_modules=["q_proj", "down_proj"])
    add_adapter(qwen(), config)
    assert config.target_parameters


def test_names_of_methods_of_peft_are_checked_before_training_too() -> None:
    with pytest.raises(PlanError, match="target_modules='vlue'"):
        add_adapter(bert(), LoraConfig(target_modules=["query", "vlue"]))


@pytest.mark.parametrize("kind", ["SEQ_CLS", TaskType.SEQ_CLS])
def test_heads_that_peft_adds_for_a_task_need_not_exist(kind: Any) -> None:
    config = LotrConfig(r=2, task_type=kind)
    get_peft_model(bert(), config)  # adds "classifier" and "score", of which a model has one
    assert set(config.modules_to_save) >= {"classifier", "score"}
    assert "AutoPeftModelForSequenceClassification" in config.card().text()
    add_adapter(bert(), LoraConfig(target_modules=["query"], task_type=kind))


def test_a_second_adapter_need_not_tell_the_task_again() -> None:
    model = get_peft_model(bert(), LotrConfig(r=2, task_type="SEQ_CLS"))
    model.add_adapter("second", LotrConfig(r=4))
    with pytest.raises(PlanError, match="clasifier"):
        model.add_adapter("third", LotrConfig(r=4, modules_to_save=["clasifier"]))


def test_defaults_name_only_what_a_model_has() -> None:
    config = LotrConfig(r=2)
    get_peft_model(llama(), config)
    assert config.target_modules == {"q_proj", "v_proj"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1))


def wavlm() -> nn.Module:
    config = WavLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         conv_dim=(16,), conv_kernel=(3,), conv_stride=(2,), num_conv_pos_embeddings=4,
                         num_conv_pos_embedding_groups=2)  # fmt: skip
    return WavLMModel(config)


@pytest.mark.parametrize(
    "make, targets",
    [
        (Block, ["attention.out_proj", "linear1", "encoder.self_attn.out_proj"]),
        (mamba, ["out_proj", "x_proj", "dt_proj"]),
        (wavlm, ["q_proj", "attention.out_proj"]),
    ],
)
def test_a_weight_that_is_read_without_its_module_is_refused(make: Any, targets: list[str]) -> None:
    for target in targets:
        with pytest.raises(PlanError, match=r"without calling it.* exclude_modules=\[.*"):
            plan(make(), LotrConfig(r=2, target_modules=[target]))


class Grouped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight.view(2, -1, x.shape[-1]).mT)


def test_a_linear_that_does_more_than_multiply_is_refused() -> None:
    config = Llama4TextConfig(hidden_size=8, num_local_experts=4)
    model = nn.ModuleDict({"router": Llama4Router(config), "o": Grouped(8, 8), "dense": FalconLinear(8, 8)})
    for name in ("router", "o"):
        with pytest.raises(PlanError, match=rf"more than multiply.* exclude_modules=\['{name}'\]"):
            plan(
                model, LotrConfig(r=2, target_modules="all-linear", exclude_modules={"router", "o"} - {name})
            )
    assert plan(model, LotrConfig(r=2, target_modules=["dense"])).n_sites == 1


def test_what_is_called_in_the_same_blocks_is_adapted() -> None:
    assert plan(mamba(), LotrConfig(r=2, target_modules=["in_proj"])).n_sites == 1
    assert plan(wavlm(), LotrConfig(r=2, target_modules=["intermediate_dense"])).n_sites == 1
    config = LotrConfig(r=2, target_modules=["linear1"], init_weights=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, x = get_peft_model(Block(), config).eval(), torch.randn(1, 3, 8)
        with torch.no_grad(), model.disable_adapter():
            base = model.base_model.model.encoder(x)
        with torch.no_grad():
            assert not torch.equal(model.base_model.model.encoder(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_all_linear_of_a_second_adapter_leaves_out_the_heads_copies(tmp_path: Path) -> None:
    def make() -> nn.Module:
        """Its head holds linear modules."""
        sizes = {**SIZES, "num_hidden_layers": 2}  # of more, PEFT keeps the ends of names alone
        return pico("RobertaForSequenceClassification", vocab_size=VOCABULARY, num_labels=3, **sizes)

    config = LotrConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(make(), copy.deepcopy(config))
    model.add_adapter("b", config)
    model.set_adapter("b")
    expected = outputs(model.eval(), {"input_ids": tokens()})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "b").eval()
    torch.testing.assert_close(outputs(loaded, {"input_ids": tokens()}), expected)
