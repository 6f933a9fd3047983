from __future__ import annotations

import pytest

from lotr import METHODS, ConfigError, LotrConfig
from lotr.cores import CORES
from lotr.magnitudes import MAGNITUDES
from lotr.methods import method
from lotr.sites import MODES
from lotr.starts import STARTS


@pytest.mark.parametrize("name", METHODS)
def test_every_row_names_things_that_exist(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    assert set(row.modes) <= set(MODES)
    assert row.core in CORES and row.magnitude in MAGNITUDES and row.start in STARTS
    assert row.url.startswith("https://") and row.title and row.purpose.endswith(".")


@pytest.mark.parametrize("name", METHODS)
def test_a_row_fills_the_configuration(name: str) -> None:
    config, row = LotrConfig(method=name), METHODS[name]
    assert (config.modes, config.core, config.magnitude, config.start) == (
        row.modes,
        row.core,
        row.magnitude,
        row.start,
    )


def test_a_field_that_is_set_overrides_the_row() -> None:
    config = LotrConfig(method="lotr", modes=("layer", "projection"), start="gaussian")
    assert config.modes == METHODS["lotr_joint"].modes and config.start == "gaussian"


def test_an_unknown_method_is_refused_with_near_matches() -> None:
    with pytest.raises(ConfigError, match=r"method='lotr_join' .*Near matches: .*lotr_joint"):
        method("lotr_join")
