"""Trained numbers of every row, by formulas written by hand from METHODS and the papers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

import lotr
from lotr import METHODS, LotrConfig

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
    "cara": (d + dh + S + H) * r,
    "lora_xs": S * r**2,
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


@pytest.fixture(scope="module")
def llama_2() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        return tf.LlamaModel(config)


def count(model: nn.Module, row: str, targets: list[str], rank: int, core_ranks: int | None = None) -> int:
    config = LotrConfig(method=row, r=rank, target_modules=targets, core_ranks=core_ranks)
    return lotr.plan(model, config).n_parameters


def test_every_row_has_a_formula() -> None:
    assert set(COUNTS) == set(METHODS)


@pytest.mark.parametrize("row", METHODS)
def test_a_row_trains_as_many_numbers_as_its_formula_says(roberta: nn.Module, row: str) -> None:
    core_ranks = q if METHODS[row].core == "tucker" else None
    assert count(roberta, row, ["query", "key", "value"], r, core_ranks) == COUNTS[row]


@pytest.mark.parametrize("construction", TENSLORA)
def test_the_published_counts_of_tenslora_are_met(roberta: nn.Module, construction: str) -> None:
    row = f"tenslora_{construction}"
    assert count(roberta, row, ["query", "key", "value"], 4, core_ranks=4) == TENSLORA[construction]
    assert count(roberta, "lora", ["query", "key", "value"], 4) == 221_184


def test_a_tucker_rank_is_by_default_no_larger_than_its_mode(roberta: nn.Module) -> None:
    expected = 2 * d * r + P * 3 + L * 4 + r * r * 3 * 4
    assert count(roberta, "tenslora_qkv_depth", ["query", "key", "value"], r) == expected


@pytest.mark.parametrize(
    "rank, lora, joint, by_projection", [(8, 294_912, 13_824, 26_112), (32, 1_179_648, 73_728, 122_880)]
)
def test_the_table_of_roberta_base(
    roberta: nn.Module, rank: int, lora: int, joint: int, by_projection: int
) -> None:
    found = [count(roberta, row, ["query", "value"], rank) for row in ("lora", "lotr_joint", "lotr")]
    assert found == [lora, joint, by_projection]


@pytest.mark.parametrize(
    "rank, lora, joint, by_projection",
    [(16, 8_388_608, 147_456, 278_528), (64, 33_554_432, 786_432, 1_310_720)],
)
def test_the_table_of_llama_2_7b(
    llama_2: nn.Module, rank: int, lora: int, joint: int, by_projection: int
) -> None:
    found = [count(llama_2, row, ["q_proj", "v_proj"], rank) for row in ("lora", "lotr_joint", "lotr")]
    assert found == [lora, joint, by_projection]
