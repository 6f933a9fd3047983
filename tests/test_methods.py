from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lotr
from lotr import METHODS, ConfigError, LotrConfig
from lotr.math.cores import CORES
from lotr.math.init import INITS, WEIGHT_INITS
from lotr.math.magnitude import MAGNITUDES
from lotr.methods import method
from lotr.sharing.blocks import BLOCKS
from lotr.sharing.make_plan import MODES, check_modes

ASKED = {"lotr", "lotr_joint", "lora", "dora", "bora", "map", "lora_xs", "lorta", "cara"}
ASKED |= {"fact_tt", "fact_tk", "metatt_4d", "metatt_5d"}
CONSTRUCTIONS = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
ASKED |= {f"tenslora_{name}{core}" for name in CONSTRUCTIONS for core in ("", "_cp")}
PAPERS = ("LoRA", "DoRA", "BoRA", "MAP", "FacT", "MetaTT", "TensLoRA", "CaRA", "LoRTA")
FIELDS = ("modes", "core", "blocks", "magnitude", "init", "trainable")
every_row = pytest.mark.parametrize("name", METHODS)


def test_all_published_methods_are_rows() -> None:
    assert set(METHODS) == ASKED


@every_row
def test_every_row_names_things_that_exist(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    assert set(row.modes) <= set(MODES) and row.modes == check_modes(row.modes)
    assert row.core in CORES and row.blocks in BLOCKS and row.magnitude in MAGNITUDES
    assert row.init in INITS | WEIGHT_INITS and row.trainable in ("all", "cores")


@every_row
def test_every_row_says_where_it_comes_from_and_what_it_is_for(name: str) -> None:
    row = METHODS[name]
    assert row.url.startswith("https://") and row.title and 2021 <= row.year <= 2025
    assert row.purpose.endswith(".") and ". " not in row.purpose


def test_no_two_rows_are_one_method() -> None:
    settings = {name: tuple(getattr(row, field) for field in FIELDS) for name, row in METHODS.items()}
    # papers that build the same thing: their rows differ in name and source alone
    same = {
        frozenset(name for name, other in settings.items() if other == setting)
        for setting in settings.values()
    }
    assert {names for names in same if len(names) > 1} == {frozenset({"lorta", "tenslora_att_qkv_depth_cp"})}


@every_row
def test_a_row_fills_the_configuration(name: str) -> None:
    config, row = LotrConfig(method=name), METHODS[name]
    assert [getattr(config, field) for field in FIELDS] == [getattr(row, field) for field in FIELDS]


@every_row
def test_the_update_of_a_row_starts_at_zero_unless_it_is_divided_by(name: str) -> None:
    assert LotrConfig(method=name).starts_at_zero is (name != "map")


def test_a_field_that_is_set_overrides_the_row() -> None:
    config = LotrConfig(method="lotr", modes=("layer", "projection"), init="gaussian")
    assert config.modes == METHODS["lotr_joint"].modes and config.init == "gaussian"


def test_an_unknown_method_is_refused_with_near_matches() -> None:
    with pytest.raises(ConfigError, match=r"method='lotr_join' .*Near matches: .*lotr_joint"):
        method("lotr_join")


def test_no_class_is_named_after_a_paper() -> None:
    files = sorted(Path(lotr.__file__).parent.rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert {"FreeCore", "PerOutput", "LotrConfig"} <= set(classes)
    named = [
        name for name in classes if not name.startswith("Lotr") and any(paper in name for paper in PAPERS)
    ]
    assert named == []
