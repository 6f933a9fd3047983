"""Before the first step: a new head warms up, factors turn towards data, or those of another adapter are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saved_models
from lotr.training.output import METRICS
from lotr.training.prepare import warm_head
from test_cli import QUICK, lotr, report

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begin")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "train.csv", rows=96, seed=0)
    saved_models.write_colours(folder / "dev.csv", rows=48, seed=1)
    return folder


def _train(place: Path, output: str, *words: str | Path) -> dict:
    data = ("--model", place / "bert", "--train", place / "train.csv", "--eval", place / "dev.csv")
    return report("train", *data, "--output", place / output, *QUICK, *words)


@pytest.fixture(scope="module")
def started(place: Path) -> dict:
    return _train(place, "started", "--init", "gradient", "--start-batches", "3", "--head-warmup", "5")


def test_a_run_that_starts_from_gradients_says_so_in_its_record(started: dict) -> None:
    assert started["begun"] == {"head_warmup": 5, "init": "gradient", "start_batches": 3}
    assert started["accuracy"] > 0.9


def test_a_new_head_warms_up_by_default(place: Path) -> None:
    warm, cold = _train(place, "warm"), _train(place, "cold", "--head-warmup", "0")
    assert warm["begun"]["head_warmup"] == min(20, warm["steps"] // 5) > 0 == cold["begun"]["head_warmup"]


def test_cores_alone_start_from_gradients_and_say_so_unless_told_otherwise(place: Path) -> None:
    data = ("--model", place / "bert", "--train", place / "train.csv", "--output", place / "cores")
    lines = " ".join(lotr("train", *data, *QUICK, "--max-steps", "2", "--trainable", "cores").stderr.split())
    assert "turned towards the gradients of 8 batches, because they stay as they start" in lines
    begun = json.loads((place / "cores" / METRICS).read_text())["begun"]
    assert begun["init"] == "gradient" and begun["start_batches"] == 8
    assert json.loads((place / "cores" / "adapter_config.json").read_text())["init"] == "gradient"
    told = _train(place, "told", "--trainable", "cores", "--init", "orthonormal", "--max-steps", "1")
    assert "init" not in told["begun"]
    xs = _train(place, "xs", "--method", "lora_xs", "--max-steps", "1")  # has a start of its own
    assert "init" not in xs["begun"]


def test_the_saved_adapter_says_how_it_started(started: dict, place: Path) -> None:
    assert json.loads((place / "started" / "adapter_config.json").read_text())["init"] == "gradient"
    again = report("evaluate", place / "started", "--data", place / "dev.csv")
    assert again["accuracy"] == pytest.approx(started["accuracy"])


def test_two_runs_of_one_seed_start_and_end_alike(started: dict, place: Path) -> None:
    _train(place, "again", "--init", "gradient", "--start-batches", "3", "--head-warmup", "5")
    one, two = (load_file(place / name / WEIGHTS) for name in ("started", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_warmed_up_head_leaves_the_adapter_where_it_was() -> None:
    from peft import get_peft_model

    from conftest import bert, tokens
    from lotr import LotrConfig

    model = get_peft_model(bert(), LotrConfig(r=4, task_type="SEQ_CLS"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    batch = {"input_ids": tokens(12), "labels": torch.arange(12) % 3}
    losses = [model(**batch).loss.item()]
    warm_head(model, iter([batch] * 30), 30, lr=3e-2)
    losses.append(model(**batch).loss.item())
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert losses[1] < losses[0] and before.keys() == after.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]) == (".modules_to_save." not in name), name
        assert parameter.grad is None


def test_a_second_task_trains_cores_on_the_factors_of_the_first(started: dict, place: Path) -> None:
    second = _train(place, "second", "--basis", place / "started")
    tensors = load_file(place / "second" / WEIGHTS)
    assert not [key for key in tensors if "lotr_U" in key or "lotr_V" in key]
    assert second["trained_numbers"]["adapter"] == 4 * 4 * 4 < started["trained_numbers"]["adapter"]
    assert second["accuracy"] > 0.8
    again = report("evaluate", place / "second", "--data", place / "dev.csv")
    assert again["accuracy"] == pytest.approx(second["accuracy"])
    assert json.loads((place / "second" / METRICS).read_text())["settings"]["basis"] == str(place / "started")
    inspected = report("inspect", place / "second")
    assert inspected["numbers"] == second["trained_numbers"]["adapter"]
    assert inspected["basis"] == started["trained_numbers"]["adapter"] - inspected["numbers"]


def test_the_model_of_the_basis_is_taken_when_none_is_named(started: dict, place: Path) -> None:
    words = ("--train", place / "train.csv", "--max-steps", "1", "--output", place / "third")
    assert report("train", *words, "--basis", place / "started")["steps"] == 1


@pytest.mark.parametrize(
    "words, says",
    [
        (("--method", "dora"), "method='dora' contradicts basis"),
        (("--rank", "8"), "r=8 contradicts basis"),
        (("--modes", "layer,projection"), "modes=('layer', 'projection') contradicts basis"),
        (("--init", "gradient"), "init='gradient' contradicts basis"),
        (("--scaling", "2"), "scaling=2.0 contradicts basis"),
        (("--target-modules", "key"), "no factors for group 'key"),
        (("--trainable", "all"), "trainable='all' contradicts basis"),
        (("--magnitude", "per_ouput"), "Near matches: per_output"),
    ],
    ids=str,
)
def test_what_contradicts_a_basis_is_refused(
    started: dict, place: Path, words: tuple[str, ...], says: str
) -> None:
    data = ("--train", place / "train.csv", "--output", place / "contradicts", "--basis", place / "started")
    result = lotr("train", *data, *words)
    assert result.exit_code != 0 and says in " ".join(result.stderr.split())
    assert not (place / "contradicts").exists()


def test_an_adapter_without_cores_is_no_basis(place: Path) -> None:
    _train(place, "lora", "--method", "lora", "--max-steps", "1")
    words = ("--train", place / "train.csv", "--output", place / "on-lora", "--basis", place / "lora")
    result = lotr("train", *words)
    assert result.exit_code != 0 and "it cannot be a basis" in " ".join(result.stderr.split())


def test_a_plan_refuses_what_training_refuses(started: dict, place: Path) -> None:
    basis = ("--basis", place / "started")
    for words, says in (
        ((*basis, "--target-modules", "query,value,key"), "has no factors for group"),
        (("--start-batches", "0"), "start_batches=0 trains nothing"),
    ):
        data = ("--train", place / "train.csv", "--output", place / "refused", "--model", place / "bert")
        for result in (lotr("plan", place / "bert", *words), lotr("train", *data, *words)):
            assert result.exit_code == 2 and says in " ".join(result.stderr.split())
    assert report("plan", place / "bert", *basis)["trained_numbers"] == 4 * 4 * 4


def test_a_basis_on_a_basis_is_refused_with_the_name_of_the_one_with_factors(
    started: dict, place: Path
) -> None:
    _train(place, "on-basis", "--basis", place / "started", "--max-steps", "1")
    for command in (("plan", place / "bert"), ("train", "--train", "x.csv", "--output", place / "refused")):
        result = lotr(*command, "--basis", place / "on-basis")
        said = " ".join(result.stderr.split())
        assert (
            result.exit_code != 0
            and f"keeps those of basis={str(place / 'started')!r}. Name that one" in said
        )


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ("--method", "peft_lora", "--init", "gradient"),
            "init='gradient' has no meaning with method='peft_lora'",
        ),
        (
            ("--basis", "nowhere/at/all"),
            "basis='nowhere/at/all' cannot be read: Adapter folder nowhere/at/all does not exist",
        ),
        (("--trainable", "core"), "trainable='core' is not known. Near matches: cores"),
        (("--start-batches", "0"), "start_batches=0"),
        (("--head-warmup", "-1"), "head_warmup=-1"),
        (("--init", "lora"), "lotr.init_from_lora(model, folder)"),
    ],
    ids=str,
)
def test_what_cannot_begin_is_refused(place: Path, words: tuple[str, ...], says: str) -> None:
    data = ("--model", place / "bert", "--train", place / "train.csv", "--output", place / "refused")
    result = lotr("train", *data, *words)
    assert result.exit_code != 0 and says in " ".join(result.stderr.split())
    assert not (place / "refused" / WEIGHTS).exists()
