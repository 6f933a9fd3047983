"""`--rank auto --budget N`: ranks from a budget, for one run or a plan, and for a run that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saved_models
from lotr import LotrConfig
from lotr.errors import ConfigError, Interrupted
from lotr.training.adapter import adapter_config
from lotr.training.run import train
from lotr.training.settings import TrainSettings
from test_cli import lotr, report
from test_training import CtrlC, quiet

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "train.csv", rows=96, seed=0)
    saved_models.write_colours(folder / "dev.csv", rows=48, seed=1)
    return folder


def _settings(place: Path, output: str, **more: object) -> TrainSettings:
    data = {name: str(place / f"{name}.csv") for name in ("train", "dev")}
    given = {"rank": "auto", "budget": 700, "batch_size": 8, "max_steps": 10, "eval_steps": 3, **more}
    return TrainSettings(
        model=str(place / "bert"), train=data["train"], eval=data["dev"], output=str(place / output), **given
    )


@pytest.mark.parametrize(
    "more", [{}, {"init": "gradient"}, {"trainable": "cores"}, {"method": "metatt_4d"}], ids=str
)
def test_a_budget_gives_all_groups_the_largest_rank(place: Path, more: dict[str, str]) -> None:
    lines: list[str] = []
    name = f"uniform-{'-'.join(more.values())}"
    result = train(_settings(place, name, max_steps=1, **more), say=lines.append)
    words = [word for key, value in more.items() for word in (f"--{key}", value)]
    planned = report("plan", place / "bert", *words, "--rank", "auto", "--budget", "700")
    assert planned["trained_numbers"] == result.trained_numbers["adapter"] <= 700
    assert json.loads((place / name / "adapter_config.json").read_text())["r"] == int(planned["rank"])
    assert planned["said"] in lines and "largest that trains at most 700 numbers" in planned["said"]


def test_a_run_that_goes_on_has_the_rank_that_was_chosen(place: Path) -> None:
    settings = _settings(place, "straight", init="gradient", start_batches=2)
    straight = train(settings, say=quiet)
    stopped = replace(settings, output=str(place / "stopped"))
    with pytest.raises(Interrupted, match="--resume"):
        train(stopped, say=quiet, callbacks=[CtrlC(4)])
    assert train(output=stopped.output, resume=True, say=quiet).rank == straight.rank
    one, two = (load_file(place / name / WEIGHTS) for name in ("straight", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "words, says",
    [
        (("--rank", "auto"), "rank='auto' needs a budget"),
        (("--budget", "700"), "rank is 16 by default. Add --rank auto"),
        (("--budget", "700", "--rank", "8"), "budget=700 chooses the rank, and rank='8' sets it"),
        (("--rank", "auto", "--budget", "0"), "budget=0 trains nothing"),
        (("--rank", "auto", "--budget", "100"), "less than rank 1 trains: 132 numbers"),
        (
            ("--rank", "auto", "--budget", "700", "--method", "peft_lora"),
            "has no meaning with method='peft_lora'",
        ),
    ],
    ids=str,
)
def test_what_a_budget_cannot_mean_is_refused(place: Path, words: tuple[str, ...], says: str) -> None:
    data = ("--model", place / "bert", "--train", place / "train.csv", "--output", place / "refused")
    result = lotr("train", *data, *words)
    assert result.exit_code != 0 and says in " ".join(result.stderr.split())
    assert not (place / "refused" / WEIGHTS).exists()


def test_the_ranks_of_a_basis_are_kept() -> None:
    settings = TrainSettings(rank="auto", budget=700, basis="runs/first")
    with pytest.raises(ConfigError, match="those of basis='runs/first' are kept"):
        adapter_config(settings, "classification")


def test_a_budget_beside_a_configuration_of_ones_own_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="config describes another"):
        train(_settings(place, "refused"), say=quiet, config=LotrConfig(task_type="SEQ_CLS"))
