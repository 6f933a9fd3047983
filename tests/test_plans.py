"""What a plan counts, and plans of whole models."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from conftest import Architecture
from lotr import LotrConfig, PlanError, plan
from lotr.sharing.blocks import Heads, Target
from lotr.sharing.make_plan import make_plan

LAYER, BOTH, ALL = ("layer",), ("layer", "projection"), ("layer", "projection", "head")
#: Construction → modes, and the numbers that the authors count on RoBERTa-base, all ranks 4.
TENSLORA = {
    "att": (("head",), 123_840),
    "qkv": (("projection",), 74_640),
    "att_qkv": (("projection", "head"), 43_728),
    "depth": (("layer",), 18_768),
    "att_depth": (("layer", "head"), 11_040),
    "qkv_depth": (("layer", "projection"), 6_460),
    "att_qkv_depth": (ALL, 4_460),
}


@pytest.mark.parametrize("construction", TENSLORA)
def test_counts_are_those_of_the_seven_tensors(construction: str) -> None:
    modes, count = TENSLORA[construction]
    targets = [
        Target(f"encoder.layer.{n}.attention.self.{p}", (768, 768), (4, 4), heads=Heads(64))
        for n in range(12)
        for p in ("query", "key", "value")
    ]
    blocks = "head" if "head" in modes else "none"
    # a mode has rank 4 even where it has three positions, as the authors count
    plan = make_plan(targets, modes, core="tucker", core_ranks=4, blocks=blocks)
    assert plan.n_parameters == count
    assert plan.lora_per_rank * 4 == 221_184


def test_core_ranks_are_at_most_the_extent_of_their_mode_unless_asked() -> None:
    paths = [f"h.{n}.{p}" for n in range(5) for p in "qkv"]
    targets = [Target(path, (8, 8), (4, 4)) for path in paths]
    ranks = [
        make_plan(targets, BOTH, core="tucker", core_ranks=asked).groups[0].core.ranks
        for asked in (None, 2, {"layer": 1})
    ]
    assert ranks == [(4, 3), (2, 2), (1, 3)]


@pytest.mark.parametrize(
    "magnitude, count",
    [("none", 0), ("per_output", 12), ("per_output_and_input", 22), ("base_and_update", 2)],
)
def test_a_magnitude_adds_numbers_to_every_module(magnitude: str, count: int) -> None:
    targets = [Target(f"h.{n}.q", (12, 10), (2, 2)) for n in range(3)]
    plan, bare = make_plan(targets, LAYER, magnitude=magnitude), make_plan(targets, LAYER)
    assert plan.n_parameters - bare.n_parameters == plan.n_magnitudes == 3 * count


def test_with_fixed_factors_only_the_cores_count() -> None:
    plan = make_plan([Target(f"h.{n}.q", (8, 8), (2, 2)) for n in range(3)], LAYER, trainable="cores")
    assert plan.n_parameters == plan.n_cores == 3 * 2 * 2 and plan.n_factors == 2 * 8 * 2


@pytest.mark.parametrize(
    "width, layers, names, rank, joint, separate, lora",
    [
        (768, 12, ("query", "value"), 8, 13_824, 26_112, 294_912),
        (768, 12, ("query", "value"), 32, 73_728, 122_880, 1_179_648),
        (4096, 32, ("q_proj", "v_proj"), 16, 147_456, 278_528, 8_388_608),
        (4096, 32, ("q_proj", "v_proj"), 64, 786_432, 1_310_720, 33_554_432),
    ],
)
def test_counts_are_those_of_the_table(
    width: int, layers: int, names: tuple[str, str], rank: int, joint: int, separate: int, lora: int
) -> None:
    targets = [Target(f"layers.{n}.{p}", (width, width), (rank, rank)) for n in range(layers) for p in names]
    one, two = make_plan(targets, BOTH), make_plan(targets, LAYER)
    assert (one.n_parameters, two.n_parameters) == (joint, separate)
    assert one.lora_per_rank * rank == lora
    assert one.equal_lora_rank == pytest.approx(joint / lora * rank)
    assert one.n_cores == two.n_cores == 2 * layers * rank**2


def test_a_plan_of_roberta_base_needs_no_weights() -> None:
    with torch.device("meta"):
        model = tf.RobertaModel(tf.RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    assert plan(model, LotrConfig(r=8)).n_parameters == 26_112
    assert plan(model, LotrConfig(r=8, method="lotr_joint")).n_parameters == 13_824


def test_a_plan_on_the_meta_device_counts_what_the_real_model_then_has(architecture: Architecture) -> None:
    from peft import get_peft_model

    config = LotrConfig(r=4, target_modules=architecture.targets)
    with torch.device("meta"):
        ghost = architecture.make()
    real = get_peft_model(architecture.make(), config)
    trained, _ = real.get_nb_trainable_parameters()
    assert plan(ghost, config).n_parameters == trained


def test_planning_changes_neither_model_nor_configuration(architecture: Architecture) -> None:
    model, config = architecture.make(), LotrConfig(r=2, target_modules="all-linear")
    modules = [type(module) for module in model.modules()]
    plan(model, config)
    assert [type(module) for module in model.modules()] == modules
    assert config.target_modules == "all-linear"


def test_a_plan_without_a_match_says_which_names_are_near() -> None:
    model = nn.Sequential()
    model.add_module("query", nn.Linear(4, 4))
    with pytest.raises(PlanError, match="Near matches: query"):
        plan(model, LotrConfig(r=2, target_modules=["querry"]))
