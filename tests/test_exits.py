"""What leaves the library as PEFT's LoRA answers as it did here: DoRA, experts, padded ranks, PEFT's own converter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from safetensors.torch import load_file
from torch import nn

import lotr
from conftest import bert, gpt2, llama, tokens
from lotr import ConfigError, LotrConfig
from lotr.tuner import to_lora
from lotr.tuner.layer import LotrLinear
from moe_models import EXPERTS, deepseek, gpt_oss, mixtral, qwen
from tuner_contract import outputs

INPUTS = {"input_ids": tokens()}


def adapted(make: Callable[[], nn.Module], folder: Path, **fields: Any) -> PeftModel:
    start: dict[str, Any] = {"r": 3, "scaling": 1.4, "init_weights": False, "seed": 0}
    model = get_peft_model(make(), LotrConfig(**(start | fields))).eval()
    for name, number in model.named_parameters():
        if "lotr_magnitude" in name:  # away from the norms of the base
            nn.init.uniform_(number, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def of_peft(make: Callable[[], nn.Module], folder: Path) -> nn.Module:
    model = PeftModel.from_pretrained(make(), folder).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    return model


ATTENTION = {llama: ["q_proj", "v_proj"], gpt2: ["c_attn", "c_proj"]}
EXPERT_FIELDS: tuple[dict[str, Any], ...] = (
    {"target_parameters": EXPERTS},
    {"target_parameters": EXPERTS[:1], "target_modules": ["q_proj"]},
    {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}},
    {"target_modules": "all-linear", "method": "lora"},
    {"target_parameters": EXPERTS, "r": (2, 5)},
)
CASES: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (gpt2, {"r": (4, 6)}),
    (gpt2, {"r": (6, 4), "method": "lotr_joint", "target_modules": ["c_attn"]}),
    (gpt2, {"r": 4, "rank_pattern": {"c_proj": 2}, "target_modules": ["c_attn", "c_proj"]}),
    *(
        (make, {"method": row, "magnitude": "per_output", "target_modules": targets})
        for make, targets in ATTENTION.items()
        for row in ("dora", "lotr")
    ),
    *((make, fields) for make in (qwen, mixtral, gpt_oss) for fields in EXPERT_FIELDS),
    # modules that PEFT, by their names, takes for experts of old
    (lambda: qwen(mlp_only_layers=[0]), EXPERT_FIELDS[2]),
    (deepseek, {"target_modules": "all-linear"}),
    (deepseek, {"target_modules": ["shared_experts.down_proj"]}),
]


@pytest.mark.filterwarnings("default:The following")  # PEFT looks for the names of ranks among modules alone
@pytest.mark.parametrize("make, fields", CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_the_lora_of_an_adapter_answers_as_it_does_with_ranks_as_they_are_and_all_brought_to_one(
    make: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(make, tmp_path / "adapter", **fields)
    answers = outputs(model, INPUTS)
    assert (answers - outputs(make(), INPUTS)).abs().max() > 1e-4
    for pad_rank in (None, 40):
        folder = tmp_path / f"lora-{pad_rank}"
        report = lotr.export(tmp_path / "adapter", folder, pad_rank=pad_rank)
        lora = of_peft(make, folder)
        torch.testing.assert_close(outputs(lora, INPUTS), answers, atol=1e-5, rtol=1e-5)
        assert lora.peft_config["default"].use_dora == ("magnitude" in fields)
        own = ("magnitude" in fields and ".lora_magnitude_vector") or ".experts."
        assert all(own in key for key in report["peft_only"])
        assert report["peft_only"] or ("magnitude" not in fields and make not in (qwen, mixtral, gpt_oss))
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (40, 40, {})
    modules = [t for key, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in key]
    if make in (llama, gpt2):
        assert {len(A) for A in modules} == {40} and not any(A[-1].any() for A in modules)


def test_a_rank_below_that_of_the_adapter_is_refused(tmp_path: Path) -> None:
    adapted(bert, tmp_path / "adapter", target_modules=["query"])
    with pytest.raises(ConfigError, match="pad_rank=2 is below the rank 3 of"):
        lotr.export(tmp_path / "adapter", tmp_path / "lora", pad_rank=2)
    assert not (tmp_path / "lora").exists()


# ---- PEFT's own converter


HEADS = {"modules_to_save": ["classifier"], "blocks": "head", "modes": ("head",)}


@pytest.mark.parametrize(
    "fields, rank",
    [
        ({"target_modules": ["query", "value"]}, 3),
        ({"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}, 12),
        ({}, 1.0),
        (HEADS, 12),
        (HEADS, 1.0),
    ],
    ids=str,
)
def test_peft_converts_exactly(fields, rank, tmp_path: Path) -> None:
    model = adapted(bert, tmp_path / "adapter", **fields)
    save_as_lora(tmp_path / "lora", model, rank=rank)
    lora = of_peft(bert, tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, INPUTS), outputs(model, INPUTS), atol=1e-5, rtol=1e-5)


def test_peft_converts_to_the_matrices_of_our_export(tmp_path: Path) -> None:
    model = adapted(bert, tmp_path / "adapter", target_modules=["query", "value"])
    lotr.export(tmp_path / "adapter", tmp_path / "lora")
    _, tensors = convert_to_lora(model, rank=8)
    exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors.keys() == exported.keys()
    assert all(torch.equal(tensors[key], exported[key]) for key in tensors)


@pytest.mark.parametrize("rank", [1, 2, 0.6])
def test_a_smaller_rank_is_the_nearest_as_peft_computes_it_from_the_dense_update(
    rank, tmp_path: Path
) -> None:
    model = adapted(bert, tmp_path / "adapter", target_modules=["query", "value"])
    _, tensors = convert_to_lora(model, rank=rank)
    for name, layer in model.named_modules():
        if isinstance(layer, LotrLinear):
            dense_A, dense_B, cut = to_lora._of_peft(layer, rank)
            A, B = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
            assert len(A) == cut
            torch.testing.assert_close(B @ A, dense_B @ dense_A, atol=1e-6, rtol=1e-5)


def test_what_no_lora_holds_is_refused_by_the_converter(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(bert, tmp_path / "a", method="dora", target_modules=["query"]), rank=4)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(qwen, tmp_path / "b", target_parameters=EXPERTS), rank=4)


def test_pefts_own_methods_are_converted_as_before() -> None:
    model = get_peft_model(bert(), LoHaConfig(r=2, target_modules=["query"], init_weights=False))
    _, tensors = convert_to_lora(model, rank=4)
    assert tensors and all(len(t) == 4 for key, t in tensors.items() if "lora_A" in key)
