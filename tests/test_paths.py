"""Layer and projection of a module, read from its path."""

from __future__ import annotations

from lotr.sharing.blocks import Site, Target
from lotr.sharing.make_plan import make_plan
from lotr.sharing.paths import coordinates, normalise
from lotr.sharing.plan import Plan


def _plan(paths: list[str], layers_pattern: tuple[str, ...] = ()) -> Plan:
    return make_plan(
        [Target(path, (8, 8), (2, 2)) for path in paths], ("layer",), layers_pattern=layers_pattern
    )


def _sites(paths: list[str], layers_pattern: tuple[str, ...] = ()) -> list[Site]:
    plan = _plan(paths, layers_pattern)
    members = {site.module: site for group in plan.groups for site in group.sites}
    return [members[path] for path in paths]


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
    named = [site.layer for site in _sites(paths, layers_pattern=("blocks",))]
    assert named == [f"stages.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]


def test_wrappers_do_not_change_the_groups() -> None:
    wrapped = _plan([f"_orig_mod.h.{n}._fsdp_wrapped_module._checkpoint_wrapped_module.q" for n in range(2)])
    assert [group.name for group in wrapped.groups] == [
        group.name for group in _plan(["h.0.q", "h.1.q"]).groups
    ]


def test_a_path_without_wrappers_is_left_alone() -> None:
    assert normalise("layers.0.self_attn.q_proj") == "layers.0.self_attn.q_proj"


def test_two_modules_never_have_the_same_coordinates() -> None:
    paths = [f"h.{n}.{p}" for n in range(2) for p in ("a.q", "b.q", "c.b.q", "v")]
    assert len(set(coordinates(paths).values())) == len(paths)
