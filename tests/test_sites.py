from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from conftest import Architecture
from lotr import ConfigError, LotrConfig, Plan, PlanError, plan
from lotr.sites import Site, Target, check_modes, make_plan

LAYER, BOTH = ("layer",), ("layer", "projection")


def _plan(paths: list[str], modes: tuple[str, ...] = LAYER, **kwargs: object) -> Plan:
    return make_plan([Target(path, (8, 8), (2, 2)) for path in paths], modes, **kwargs)


def _sites(paths: list[str], **kwargs: object) -> list[Site]:
    plan = _plan(paths, **kwargs)
    return [next(s for s in plan.group_of[path].sites if s.module == path) for path in paths]


# ---- layer and projection, read from the path


def test_the_layer_is_the_number_and_the_projection_the_last_name() -> None:
    query, value = _sites(["encoder.layer.0.attention.query", "encoder.layer.11.attention.value"])
    assert (query.layer, query.projection) == ("encoder.layer.0", "query")
    assert (value.layer, value.projection) == ("encoder.layer.11", "value")


def test_of_two_numbers_in_a_path_the_first_that_varies_is_the_layer() -> None:
    paths = [f"decoder.block.{b}.layer.{a}.{n}.q" for b in (0, 1) for a, n in ((0, "Self"), (1, "Cross"))]
    layers = [site.layer for site in _sites(paths)]
    assert layers == ["decoder.block.0", "decoder.block.0", "decoder.block.1", "decoder.block.1"]


def test_names_that_occur_twice_in_a_layer_are_told_apart_by_their_path() -> None:
    paths = [f"layer.{n}.{part}.dense" for n in range(2) for part in ("attention", "output")]
    assert {site.projection for site in _sites(paths)} == {"attention.dense", "output.dense"}


def test_experts_of_one_layer_are_projections_of_that_layer() -> None:
    paths = [f"layers.{n}.mlp.experts.{e}.up" for n in range(2) for e in range(3)]
    sites = _sites(paths)
    assert {site.layer for site in sites} == {"layers.0", "layers.1"}
    assert {site.projection for site in sites} == {f"mlp.experts.{e}.up" for e in range(3)}


def test_a_constant_number_in_front_is_not_the_layer() -> None:
    paths = [f"0.auto_model.encoder.layer.{n}.query" for n in range(3)]
    assert [site.layer for site in _sites(paths)] == [f"0.auto_model.encoder.layer.{n}" for n in range(3)]


def test_a_module_without_a_number_is_its_own_layer() -> None:
    (site,) = _sites(["classifier.dense"])
    assert (site.layer, site.projection) == ("classifier.dense", "dense")


def test_linears_directly_in_a_list_are_layers_of_one_projection() -> None:
    plan = _plan(["layers.0", "layers.1", "layers.2"])
    assert [group.projections for group in plan.groups] == [("layers",)]


def test_layers_pattern_says_which_number_is_the_layer() -> None:
    paths = [f"stages.{s}.blocks.{b}.fc" for s in (0, 1) for b in (0, 1)]
    assert [site.layer for site in _sites(paths)] == ["stages.0", "stages.0", "stages.1", "stages.1"]
    named = [site.layer for site in _sites(paths, layers_pattern=["blocks"])]
    assert named == [f"stages.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]


def test_wrappers_do_not_change_the_groups() -> None:
    wrapped = _plan([f"_orig_mod.h.{n}._fsdp_wrapped_module._checkpoint_wrapped_module.q" for n in range(2)])
    assert [group.name for group in wrapped.groups] == [
        group.name for group in _plan(["h.0.q", "h.1.q"]).groups
    ]


# ---- groups


def test_layers_share_factors_and_projections_do_not() -> None:
    plan = _plan([f"h.{n}.{p}" for n in range(3) for p in "qv"])
    assert [(group.projections, len(group.sites)) for group in plan.groups] == [(("q",), 3), (("v",), 3)]


def test_with_both_modes_all_sites_share_factors() -> None:
    (group,) = _plan([f"h.{n}.{p}" for n in range(3) for p in "qv"], BOTH).groups
    assert group.projections == ("q", "v") and group.core.sizes == (3, 2)
    assert group.index["h.2.v"] == (2, 1)


def test_without_modes_every_site_is_alone() -> None:
    assert len(_plan([f"h.{n}.{p}" for n in range(3) for p in "qv"], ()).groups) == 6


def test_sites_of_unequal_shape_fall_into_separate_groups() -> None:
    plan = make_plan([Target(f"h.{n}.fc", (8 + n // 2, 8), (2, 2)) for n in range(4)], LAYER)
    assert [(group.name, len(group.sites)) for group in plan.groups] == [("fc_8x8", 2), ("fc_9x8", 2)]


def test_group_names_are_unique_without_dots_and_without_the_prefix() -> None:
    names = [group.name for group in _plan(["a.b-c.q", "a-b.c.q", "h.lotr_x.q"], ()).groups]
    assert len(set(names)) == 3
    assert all("." not in name and "lotr_" not in name and name.endswith("_8x8") for name in names)


def test_a_group_can_be_a_key_of_a_dictionary() -> None:
    (group,) = _plan(["h.0.q", "h.1.q"]).groups
    assert {group: 1}[group] == 1


# ---- refusals


def test_projections_of_unequal_shape_cannot_be_asked_to_share() -> None:
    targets = [Target(f"h.{n}.{p}", (o, 8), (2, 2)) for n in range(2) for p, o in (("q", 8), ("v", 4))]
    message = (
        r'Sites of projections "q\|v" cannot share factors: their blocks are \(8, 8\) and \(4, 8\)\. '
        r"Shared factors need equal blocks\. Drop \"projection\" from modes"
    )
    with pytest.raises(PlanError, match=message):
        make_plan(targets, BOTH)


def test_unequal_ranks_in_a_group_are_refused() -> None:
    targets = [Target("h.0.q", (8, 8), (2, 2)), Target("h.1.q", (8, 8), (4, 4))]
    with pytest.raises(PlanError, match=r'"h.0.q" asks for rank \(2, 2\) and "h.1.q" for rank \(4, 4\)'):
        make_plan(targets, LAYER)


@pytest.mark.parametrize("rank", [(9, 2), (2, 7)], ids=str)
def test_a_rank_above_the_block_is_refused_with_the_largest_that_fits(rank: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match=r"does not fit .* blocks are \(8, 6\)"):
        make_plan([Target("h.0.q", (8, 6), rank)], LAYER)


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"names 'layers', which is not a coordinate"):
        check_modes(["layers"])


# ---- counts


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
