"""Pictures: what is drawn where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import painted
from lotr.adapters.inspection import SiteReport
from lotr.adapters.plots import check_picture, confusion, curve, norms_by_place
from lotr.errors import ConfigError


def test_names_are_no_formulas(tmp_path: Path) -> None:
    with painted():
        confusion(np.eye(2, dtype=int), ["US$_$", "$\\x$"], tmp_path / "a.png")
        curve([{"step": 1, "loss": 2.0}], "accuracy", "on $a_$.csv", tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


@pytest.mark.parametrize("name", ["a.foo", "a", "none/a.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--picture"):
        check_picture(tmp_path / name)


def test_heads_of_one_place_are_drawn_as_one_number_and_layers_in_their_order() -> None:
    places = [("2", "query", 0.5), ("10", "query", 0.3), ("10", "query", 0.4), ("10", "value", 1.0)]
    sites = [
        SiteReport("m", "g", layer, name, n, None, norm, 1.0) for n, (layer, name, norm) in enumerate(places)
    ]
    layers, projections, norms = norms_by_place(sites)
    assert layers == ["2", "10"] and projections == ["query", "value"]
    np.testing.assert_allclose(norms, [[0.5, np.nan], [0.5, 1.0]])
