"""What a plan counts: every row by formulas written by hand from METHODS and the papers, and whole models."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

import lotr
from conftest import Architecture
from lotr import METHODS, LotrConfig
from lotr.sharing.blocks import Target
from lotr.sharing.make_plan import make_plan
from lotr.sharing.plan import Plan

# RoBERTa-base with query, key and value, in the papers' letters
d, L, P, H = 768, 12, 3, 12  # width, layers, projections, heads
dh = d // H
r, q = 4, 4  # rank of the factors, and of every mode of a Tucker core
S = L * P

COUNTS = {
    "lotr": P * (2 * d * r + L * r**2),
    "lotr_joint": 2 * d * r + S * r**2,
    "lora": S * 2 * d * r,
    "dora": S * (2 * d * r + d),
    "bora": S * (2 * d * r + 2 * d),
    "map": S * (2 * d * r + 2),
    # one tensor for each combination of the coordinates that are left out
    "tenslora_att": L * P * (d * r + dh * r + H * q + r * r * q),
    "tenslora_qkv": L * (2 * d * r + P * q + r * r * q),
    "tenslora_depth": P * (2 * d * r + L * q + r * r * q),
    "tenslora_att_qkv": L * (d * r + dh * r + (H + P) * q + r * r * q**2),
    "tenslora_att_depth": P * (d * r + dh * r + (H + L) * q + r * r * q**2),
    "tenslora_qkv_depth": 2 * d * r + (P + L) * q + r * r * q**2,
    "tenslora_att_qkv_depth": d * r + dh * r + (H + P + L) * q + r * r * q**3,
    "tenslora_att_cp": L * P * (d + dh + H) * r,
    "tenslora_qkv_cp": L * (d + d + P) * r,
    "tenslora_depth_cp": P * (d + d + L) * r,
    "tenslora_att_qkv_cp": L * (d + dh + H + P) * r,
    "tenslora_att_depth_cp": P * (d + dh + H + L) * r,
    "tenslora_qkv_depth_cp": (d + d + P + L) * r,
    "tenslora_att_qkv_depth_cp": (d + dh + H + P + L) * r,
    "fact_tt": 2 * d * r + S * r**2,
    "fact_tk": 2 * d * r + S * q + r * r * q,
    "lorta": (d + dh + L + P + H) * r,
    "metatt_4d": 2 * d * r + (L + P) * r**2,
    "metatt_5d": d * r + dh * r + (L + P + H) * r**2,
    "cara": (d + dh + S + H + 1) * r,
    "lora_xs": S * r**2,
    "lora_sb": S * r**2,
    "moslora": S * (2 * d * r + r**2),
}

TENSLORA = {  # arXiv 2509.19391, all ranks 4
    "att": 123_840,
    "qkv": 74_640,
    "att_qkv": 43_728,
    "depth": 18_768,
    "att_depth": 11_040,
    "qkv_depth": 6_460,
    "att_qkv_depth": 4_460,
}


@pytest.fixture(scope="module")
def roberta() -> nn.Module:
    with torch.device("meta"):
        return tf.RobertaModel(tf.RobertaConfig(vocab_size=50265, max_position_embeddings=514))


def planned(model: nn.Module, row: str, targets: list[str], rank: int) -> Plan:
    config = LotrConfig(method=row, r=rank, target_modules=targets)
    if METHODS[row].core == "tucker":
        config.core_ranks = q
    return lotr.plan(model, config)


def test_every_row_has_a_formula() -> None:
    assert set(COUNTS) == set(METHODS)


@pytest.mark.parametrize("row", METHODS)
def test_a_row_trains_as_many_numbers_as_its_formula_says(roberta: nn.Module, row: str) -> None:
    plan = planned(roberta, row, ["query", "key", "value"], r)
    assert plan.n_parameters == COUNTS[row] and plan.lora_per_rank * r == COUNTS["lora"]
    assert plan.equal_lora_rank == pytest.approx(r * COUNTS[row] / COUNTS["lora"])


def test_with_all_weights_lorta_and_cara_have_the_counts_of_their_papers(roberta: nn.Module) -> None:
    attention = ["query", "key", "value", "attention.output.dense"]
    assert planned(roberta, "lorta", attention, r).n_parameters == (d + dh + L + H + 4) * r
    every = [*attention, "intermediate.dense", r"output.dense"]
    # λ and four factors of query, key and value; λ and three of (9 L) × d × d; biases of o, fc1 and fc2
    of_tensors = (1 + 3 * L + d + H + dh) * r + (1 + 9 * L + 2 * d) * r
    assert planned(roberta, "cara", every, r).n_parameters == of_tensors + d + 4 * d + d


def grouped(width: int, heads: int, few: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": few}


GROUPED = {
    "Llama 8B": (tf.LlamaModel, tf.LlamaConfig(**grouped(4096, 32, 8))),
    "SmolLM 135M": (tf.LlamaModel, tf.LlamaConfig(**grouped(576, 9, 3))),
    "Qwen2 0.5B": (tf.Qwen2Model, tf.Qwen2Config(**grouped(896, 14, 2))),
    "Qwen3 0.6B": (tf.Qwen3Model, tf.Qwen3Config(**grouped(1024, 16, 8), head_dim=128)),
}


@functools.cache
def grouped_model(kind: str) -> nn.Module:
    cls, config = GROUPED[kind]
    with torch.device("meta"):
        return cls(config)


#: Every row on the most usual kind, and on one of the others in turn.
KINDS = [(row, kind) for n, row in enumerate(METHODS) for kind in ("Llama 8B", list(GROUPED)[1 + n % 3])]


@pytest.mark.parametrize("row, kind", KINDS)
def test_every_row_exists_on_grouped_queries_with_default_targets(row: str, kind: str) -> None:
    plan = lotr.plan(grouped_model(kind), LotrConfig(method=row, r=8))
    if "projection" in METHODS[row].modes:
        assert all(group.core.sizes[group.modes.index("projection")] == 2 for group in plan.groups)


def test_the_published_counts_of_tenslora_are_met() -> None:
    assert {name: COUNTS[f"tenslora_{name}"] for name in TENSLORA} == TENSLORA and COUNTS["lora"] == 221_184


# ---- single counts


def test_core_ranks_are_at_most_the_extent_of_their_mode_unless_asked() -> None:
    paths = [f"h.{n}.{p}" for n in range(5) for p in "qkv"]
    targets = [Target(path, (8, 8), (4, 4)) for path in paths]
    ranks = [
        make_plan(targets, ("layer", "projection"), core="tucker", core_ranks=asked).groups[0].core.ranks
        for asked in (None, 2, {"layer": 1})
    ]
    assert ranks == [(4, 3), (2, 2), (1, 3)]


def test_with_fixed_factors_only_the_cores_count() -> None:
    plan = make_plan([Target(f"h.{n}.q", (8, 8), (2, 2)) for n in range(3)], ("layer",), trainable="cores")
    assert plan.n_parameters == plan.n_cores == 3 * 2 * 2 and plan.n_factors == 2 * 8 * 2


def test_a_plan_on_the_meta_device_counts_what_the_real_model_then_has(architecture: Architecture) -> None:
    config = LotrConfig(r=4, target_modules=architecture.targets)
    with torch.device("meta"):
        ghost = architecture.make()
    real = get_peft_model(architecture.make(), config)
    trained, _ = real.get_nb_trainable_parameters()
    assert lotr.plan(ghost, config).n_parameters == trained


def test_planning_changes_neither_model_nor_configuration(architecture: Architecture) -> None:
    model, config = architecture.make(), LotrConfig(r=2, target_modules="all-linear")
    modules = [type(module) for module in model.modules()]
    lotr.plan(model, config)
    assert [type(module) for module in model.modules()] == modules
    assert config.target_modules == "all-linear"
