"""Pictures: what is drawn where."""

from __future__ import annotations

import numpy as np

from lotr.adapters.inspection import SiteReport
from lotr.adapters.plots import norms_by_place


def test_heads_of_one_place_are_drawn_as_one_number_and_layers_in_their_order() -> None:
    places = [("2", "query", 0.5), ("10", "query", 0.3), ("10", "query", 0.4), ("10", "value", 1.0)]
    sites = [
        SiteReport("m", "g", layer, name, n, None, norm, 1.0) for n, (layer, name, norm) in enumerate(places)
    ]
    layers, projections, norms = norms_by_place(sites)
    assert layers == ["2", "10"] and projections == ["query", "value"]
    np.testing.assert_allclose(norms, [[0.5, np.nan], [0.5, 1.0]])
