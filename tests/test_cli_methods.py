"""The table of methods from the shell: every row by its name, and every field of a row as an option."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from commands import lotr, report
from lotr import METHODS, LotrConfig
from lotr.methods import Method
from lotr.training.adapter import adapter_config
from lotr.training.settings import TrainSettings


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_configured_by_its_name_as_in_python(name: str) -> None:
    config = adapter_config(
        TrainSettings(method=name, rank="4", target_modules="query,value"), "classification"
    )
    same = LotrConfig(method=name, r=4, target_modules=["query", "value"], task_type="SEQ_CLS", seed=0)
    assert config.to_dict() == same.to_dict()


def test_a_combination_without_a_row_is_said_with_fields(place: Path) -> None:
    fields = ("--modes", "head, layer", "--core", "tucker", "--core-ranks", "layer=2,head=3")
    fields = (*fields, "--blocks", "head", "--magnitude", "per_output", "--trainable", "cores", "--rank", "4")
    plan = report("plan", place / "bert", *fields)
    assert plan["factor_numbers"] and plan["trains"] == "cores"
    # a group for query and one for value: a core of 2·3·4·4, factors 2 layers × 2 and 4 heads × 3
    assert plan["core_numbers"] == 2 * (2 * 3 * 4 * 4 + 2 * 2 + 4 * 3)
    assert plan["magnitude_numbers"] == 4 * 32
    assert plan["trained_numbers"] == plan["core_numbers"] + plan["magnitude_numbers"]


def test_every_field_of_a_row_is_an_option() -> None:
    of_row = {field.name for field in dataclasses.fields(Method)}
    described = {"name", "title", "year", "url", "purpose", "differs"}
    assert of_row - described <= {field.name for field in dataclasses.fields(TrainSettings)}


def test_options_reach_the_configuration() -> None:
    own = {"alpha": 4.0, "zero": "output", "core_init": "identity", "unequal": "slice"}
    own |= {"dropout": 0.1, "dropout_place": "core_output", "lora_bias": True, "layers_per_group": 2}
    settings = TrainSettings(method="lotr", rank="8", target_parameters="mlp.experts.a, mlp.experts.b", **own)
    config = adapter_config(settings)
    assert config.scaling == 0.5 and config.target_parameters == ["mlp.experts.a", "mlp.experts.b"]
    assert (config.zero, config.core_init, config.unequal) == ("output", "identity", "slice")
    assert config.layers_per_group == 2
    assert (config.dropout, config.dropout_place, config.lora_bias) == (0.1, "core_output", True)


def test_what_a_method_turns_on_can_be_turned_off(place: Path) -> None:
    words = ("plan", place / "bert", "--method", "cara", "--target-modules", "all-linear")
    with_biases, without = report(*words), report(*words, "--no-lora-bias")
    biases = with_biases["core_numbers"] - without["core_numbers"]
    assert biases == 32 + 64 + 32 + 32  # of o, fc1, fc2 and the pooler


def test_lotr_methods_says_where_a_row_differs_from_its_paper() -> None:
    text = " ".join(lotr("methods").stdout.replace("│", " ").split())
    assert all(" ".join(row.differs.split()) in text for row in METHODS.values())
