from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lotr
from lotr import METHODS, LotrConfig
from lotr.math.cores import CORES
from lotr.math.dropout import PLACES
from lotr.math.init import CORE_INITS, INITS, WEIGHT_INITS, ZEROS
from lotr.math.magnitude import MAGNITUDES
from lotr.sharing.blocks import BLOCKS
from lotr.sharing.make_plan import MODES, check_modes

ASKED = {"lotr", "lotr_joint", "lora", "dora", "bora", "map", "moslora", "lora_xs", "lora_sb", "lorta"}
ASKED |= {"cara", "fact_tt", "fact_tk", "metatt_4d", "metatt_5d"}
CONSTRUCTIONS = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
ASKED |= {f"tenslora_{name}{core}" for name in CONSTRUCTIONS for core in ("", "_cp")}
PAPERS = ("LoRA", "DoRA", "BoRA", "MAP", "FacT", "MetaTT", "TensLoRA", "CaRA", "LoRTA")
FIELDS = ("modes", "core", "blocks", "magnitude", "init", "core_init", "zero", "trainable", "dropout_place")
every_row = pytest.mark.parametrize("name", METHODS)


def test_all_published_methods_are_rows() -> None:
    assert set(METHODS) == ASKED


@every_row
def test_every_row_names_things_that_exist(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    assert set(row.modes) <= set(MODES) and row.modes == check_modes(row.modes)
    assert row.core in CORES and row.blocks in BLOCKS and row.magnitude in MAGNITUDES
    assert row.init in {*INITS, *WEIGHT_INITS, "first_step"} and row.trainable in ("all", "cores")
    assert row.core_init in (None, *CORE_INITS) and row.zero in ZEROS and row.dropout_place in PLACES


@every_row
def test_every_row_says_where_it_comes_from_and_what_it_is_for(name: str) -> None:
    row = METHODS[name]
    assert row.url.startswith("https://") and row.title and 2021 <= row.year <= 2025
    assert row.purpose.endswith(".") and ". " not in row.purpose


def test_no_two_rows_are_one_method() -> None:
    settings = {tuple(getattr(row, field) for field in FIELDS) for row in METHODS.values()}
    assert len(settings) == len(METHODS)


@every_row
def test_a_row_fills_the_configuration(name: str) -> None:
    config, row = LotrConfig(method=name), METHODS[name]
    assert [getattr(config, field) for field in FIELDS] == [getattr(row, field) for field in FIELDS]


@every_row
def test_the_update_of_a_row_starts_at_zero_unless_it_is_divided_by(name: str) -> None:
    assert LotrConfig(method=name).starts_at_zero is (name not in ("map", "lora_xs"))


@pytest.mark.parametrize(
    "name, scaling", [("lotr", 1), ("lora", 1), ("lorta", 0.5), ("lora_xs", 1), ("cara", 1)]
)
def test_the_scaling_is_that_of_the_row_and_follows_the_rank(name: str, scaling: float) -> None:
    config = LotrConfig(method=name)
    assert config.scaling == scaling
    config.set_rank(32)
    assert config.scaling == (scaling / 2 if METHODS[name].alpha else scaling)
    assert LotrConfig(method=name, alpha=32).scaling == 2 and LotrConfig(method=name, scaling=3).scaling == 3


def test_a_field_that_is_set_overrides_the_row() -> None:
    config = LotrConfig(method="lotr", modes=("layer", "projection"), init="gaussian", zero="output")
    assert config.modes == METHODS["lotr_joint"].modes
    assert (config.init, config.zero) == ("gaussian", "output")


def test_no_class_is_named_after_a_paper() -> None:
    files = sorted(Path(lotr.__file__).parent.rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert {"FreeCore", "PerOutput", "LotrConfig"} <= set(classes)
    named = [
        name for name in classes if not name.startswith("Lotr") and any(paper in name for paper in PAPERS)
    ]
    assert named == []
