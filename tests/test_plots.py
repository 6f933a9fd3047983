"""Pictures: what is drawn where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lotr.adapters import plots


def test_heads_of_one_place_are_drawn_as_one_number_and_layers_in_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple] = []
    monkeypatch.setattr(plots, "heat_map", lambda *given: drawn.append(given))
    places = [("2", "query"), ("10", "query"), ("10", "query"), ("10", "value")]
    plots.by_place(places, [0.5, 0.2, 0.4, 1.0], "share", tmp_path / "picture.png")
    values, layers, projections, *_ = drawn[0]
    assert layers == ["2", "10"] and projections == ["query", "value"]
    np.testing.assert_allclose(values, [[0.5, np.nan], [0.3, 1.0]])
