"""Every row of the table of methods through the command line: plan, train, evaluate, inspect, export or merge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from commands import lotr, report, training
from conftest import bert
from lotr import METHODS, LotrConfig
from lotr import plan as lotr_plan
from lotr.math.magnitude import MAGNITUDES
from lotr.methods import Method
from lotr.training.adapter import adapter_config
from lotr.training.settings import TrainSettings

FIELDS = ("--rank", "4", "--target-modules", "query,key,value,attention.output.dense,intermediate.dense")


#: The first row of every core, magnitude, start and choice of what trains: of a row the shell knows the name alone.
KINDS = {(row.core, row.magnitude, row.init, row.trainable): name for name, row in reversed(METHODS.items())}


def test_every_row_is_planned_by_its_name(place: Path) -> None:
    with torch.device("meta"):
        base = bert(num_hidden_layers=2)
    for name in METHODS:
        planned = report("plan", place / "bert", "--method", name, *FIELDS)
        config = LotrConfig(method=name, r=4, target_modules=FIELDS[-1].split(","))
        assert planned["trained_numbers"] == lotr_plan(base, config).n_parameters, name


@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_a_row_runs_from_plan_to_export_or_merge(place: Path, name: str) -> None:
    adapter = place / name
    plan = report("plan", place / "bert", "--method", name, *FIELDS)
    words = ("--method", name, *FIELDS, "--max-steps", "4", "--output", adapter)
    trained = report(*training(place), *words)
    assert trained["trained_numbers"]["adapter"] == plan["trained_numbers"]
    again = report("evaluate", adapter, "--data", place / "dev.csv")
    assert again["accuracy"] == pytest.approx(trained["accuracy"])
    sites = report("inspect", adapter)["sites"]
    assert len(sites) == plan["sites"] and any(site["norm"] > 0 for site in sites)

    merged = report("merge", adapter, "--output", place / f"{name}-merged")
    exported = lotr("export", adapter, "--output", place / f"{name}-lora")
    if MAGNITUDES[METHODS[name].magnitude].has_lora_form:
        assert exported.exit_code == 0, exported.stderr
        _answers_alike(place / f"{name}-lora", Path(merged["output"]))
    else:
        assert exported.exit_code == 1 and "lotr merge" in exported.stderr
        assert not (place / f"{name}-lora").exists()


def _answers_alike(lora: Path, merged: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    with safe_open(lora / "adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lotr" in key]  # noqa: SIM118
    ids = torch.arange(3, 12).repeat(2, 1)
    ours = AutoPeftModelForSequenceClassification.from_pretrained(lora, num_labels=3).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)


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
    own |= {"dropout": 0.1, "dropout_place": "core_output", "lora_bias": True}
    settings = TrainSettings(method="lotr", rank="8", target_parameters="mlp.experts.a, mlp.experts.b", **own)
    config = adapter_config(settings)
    assert config.scaling == 0.5 and config.target_parameters == ["mlp.experts.a", "mlp.experts.b"]
    assert (config.zero, config.core_init, config.unequal) == ("output", "identity", "slice")
    assert (config.dropout, config.dropout_place, config.lora_bias) == (0.1, "core_output", True)


def test_what_a_method_turns_on_can_be_turned_off(place: Path) -> None:
    words = ("plan", place / "bert", "--method", "cara", "--target-modules", "all-linear")
    with_biases, without = report(*words), report(*words, "--no-lora-bias")
    biases = with_biases["core_numbers"] - without["core_numbers"]
    assert biases == 32 + 64 + 32 + 32  # of o, fc1, fc2 and the pooler


def test_lotr_methods_says_where_a_row_differs_from_its_paper() -> None:
    text = " ".join(lotr("methods").stdout.replace("│", " ").split())
    assert all(" ".join(row.differs.split()) in text for row in METHODS.values())
