"""Layer and projection of a module, read from its path."""

from __future__ import annotations

import pytest

from lotr.sharing.paths import coordinates, normalise


@pytest.mark.parametrize(
    "paths, layers, projections",
    [
        # the number, and the last name
        (["encoder.layer.0.self.query", "encoder.layer.11.self.value"], [0, 11], ["query", "value"]),
        # of two numbers the first that varies
        ([f"block.{b}.layer.{a}.{n}.q" for b in (0, 1) for a, n in ((0, "S"), (1, "C"))], [0, 0, 1, 1], None),
        # a constant number in front is not the layer
        ([f"0.auto_model.encoder.layer.{n}.query" for n in range(3)], [0, 1, 2], ["query"] * 3),
        # names that occur twice in a layer are told apart by their path
        (["h.0.attention.dense", "h.0.output.dense"], [0, 0], ["attention.dense", "output.dense"]),
        # experts of one layer are projections of that layer
        ([f"h.{n}.mlp.experts.3.up" for n in range(2)], [0, 1], ["up", "up"]),
        (["h.0.experts.0.up", "h.0.experts.1.up", "h.1.q"], [0, 0, 1], ["experts.0.up", "experts.1.up", "q"]),
        ([f"h.0.{p}" for p in ("a.q", "b.q", "c.b.q", "v")], [0] * 4, ["a.q", "b.q", "c.b.q", "v"]),
        # linears directly in a list are layers of one projection
        (["layers.0", "layers.1"], [0, 1], ["layers", "layers"]),
    ],
)
def test_layer_and_projection_are_read_from_the_path(
    paths: list[str], layers: list[int], projections: list[str] | None
) -> None:
    places = coordinates(paths)
    assert [int(places[path][0].rpartition(".")[2]) for path in paths] == layers
    assert projections in (None, [places[path][1] for path in paths])
    assert len(set(places.values())) == len(paths)


def test_a_module_without_a_number_is_its_own_layer() -> None:
    assert coordinates(["classifier.dense"]) == {"classifier.dense": ("classifier.dense", "dense")}


def test_layers_pattern_says_which_number_is_the_layer() -> None:
    paths = [f"stages.{s}.blocks.{b}.fc" for s in (0, 1) for b in (0, 1)]
    layers = [[place[0] for place in coordinates(paths, pattern).values()] for pattern in ((), ("blocks",))]
    assert layers[0] == ["stages.0", "stages.0", "stages.1", "stages.1"]
    assert layers[1] == [f"stages.{s}.blocks.{b}" for s in (0, 1) for b in (0, 1)]


def test_wrappers_do_not_change_coordinates() -> None:
    wrapped = [f"_orig_mod.h.{n}._fsdp_wrapped_module._checkpoint_wrapped_module.q" for n in range(2)]
    assert list(coordinates(wrapped).values()) == list(coordinates(["h.0.q", "h.1.q"]).values())
    assert normalise("layers.0.self_attn.q_proj") == "layers.0.self_attn.q_proj"
