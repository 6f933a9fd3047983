"""A place that holds something else than a command needs, a model that cannot do the task, columns of other names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import banks
import saved_models
from commands import lotr, refused


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "train.csv", rows=48)
    header, _, rows = (folder / "train.csv").read_text().partition("\n")
    assert header.strip() == "text,label"
    (folder / "other.csv").write_text(f"sentence,colour\n{rows}")
    words = ("--model", folder / "bert", "--train", folder / "train.csv", "--output", folder / "adapter")
    done = lotr("train", *words, "--max-steps", "2", "--rank", "2")
    assert done.exit_code == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "asked", [("--task", "causal-lm"), ("--label", "colour", "--task", "causal-lm"), ("--text", "sentence")]
)
def test_an_encoder_is_not_trained_to_write_text(place: Path, tmp_path: Path, asked: tuple[str, ...]) -> None:
    data = place / ("other.csv" if "sentence" in asked else "train.csv")
    words = ("--model", place / "bert", "--train", data, "--output", tmp_path / "o")
    text = refused(2, "train", *words, *asked)
    assert "no causal language model" in text
    assert "--label" in text
    assert not (tmp_path / "o").exists()


def test_a_length_left_open_is_what_the_model_takes(place: Path) -> None:
    assert json.loads((place / "adapter" / "task.json").read_text())["max_length"] == 64  # and not 128


def test_a_bank_is_not_an_adapter_and_the_message_says_what_answers(tmp_path: Path, place: Path) -> None:
    banks.bank(tmp_path, tasks=1).close()
    text = refused(1, "evaluate", tmp_path / "bank", "--data", place / "train.csv")
    assert "is a bank" in text
    assert "lotr predict" in text and "lotr bank export" in text


def test_a_run_that_was_stopped_is_no_adapter_yet(tmp_path: Path, place: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    text = refused(1, "evaluate", tmp_path / "run", "--data", place / "train.csv")
    assert "lotr train --resume --output" in text
    assert "does not exist" in refused(2, "train", "--resume", "--output", tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ("--model", place / "bert", "--train", place / "train.csv", "--max-steps", "1", "--rank", "2")
    text = refused(1, "train", *words, "--output", tmp_path / "file" / "o")
    assert f"{tmp_path / 'file'}" in text


def test_predictions_never_take_the_place_of_the_data(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_bytes((place / "train.csv").read_bytes())
    text = refused(2, "predict", place / "adapter", "--data", data, "--output", data, "--overwrite")
    assert "is the data" in text
    assert data.read_bytes() == (place / "train.csv").read_bytes()


def test_columns_may_be_called_otherwise_than_in_training(place: Path, tmp_path: Path) -> None:
    words = ("evaluate", place / "adapter", "--data", place / "other.csv")
    assert "--text" in refused(1, *words)
    named = lotr(*words, "--text", "sentence", "--label", "colour", "--json")
    plain = lotr("evaluate", place / "adapter", "--data", place / "train.csv", "--json")
    scores = [json.loads(result.stdout) for result in (named, plain)]
    assert scores[0]["confusion"] == scores[1]["confusion"]
    rows = tmp_path / "p.jsonl"
    done = lotr(
        "predict", place / "adapter", "--data", place / "other.csv", "--text", "sentence", "--output", rows
    )
    assert done.exit_code == 0, done.stderr
    assert len(rows.read_text().splitlines()) == 48


def test_ranks_that_are_not_the_file_s_do_not_blame_the_model(place: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    text = refused(1, "evaluate", folder, "--data", place / "train.csv")
    assert "is not the one that was saved with it" in text
    assert "name that one with --model" not in text
