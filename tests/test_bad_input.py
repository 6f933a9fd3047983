"""What a user can get wrong: one readable message, the right exit code, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import banks
import saved_models
from commands import lotr, refused

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "train.csv", rows=48)
    _, _, rows = (folder / "train.csv").read_text().partition("\n")
    (folder / "other.csv").write_text(f"sentence,colour\n{rows}")
    done = lotr(*training(folder), "--output", folder / "adapter", "--max-steps", "2", "--rank", "2")
    assert done.exit_code == 0, done.stderr
    return folder


def training(place: Path, train: str = "train.csv") -> tuple[str | Path, ...]:
    return ("train", "--model", place / "bert", "--train", place / train)


@pytest.fixture
def adapter(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))


def test_missing_data_file_names_near_ones(place: Path, tmp_path: Path) -> None:
    text = refused(1, *training(place, "trian.csv"), "--output", tmp_path / "o")
    assert "trian.csv" in text
    assert "train.csv" in text
    assert not (tmp_path / "o").exists()


def test_missing_column_says_which_exist_and_which_option_names_it(place: Path, tmp_path: Path) -> None:
    text = refused(1, *training(place), "--text", "sentence", "--output", tmp_path / "o")
    assert '"sentence"' in text
    assert "text, label" in text
    assert "--text" in text


@pytest.mark.parametrize("content", ["", "text,label\n"])
def test_empty_file_is_refused(place: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.csv").write_text(content)
    text = refused(
        1, "train", "--model", place / "bert", "--train", tmp_path / "empty.csv", "--output", tmp_path / "o"
    )
    assert "empty.csv" in text


def test_labels_that_train_and_eval_do_not_share_are_named(place: Path, tmp_path: Path) -> None:
    saved_models.write_colours(tmp_path / "dev.csv", rows=12, labels=("red", "purple"))
    text = refused(1, *training(place), "--eval", tmp_path / "dev.csv", "--output", tmp_path / "o")
    assert "purple" in text
    assert refused(1, "evaluate", place / "adapter", "--data", tmp_path / "dev.csv").count("purple")


def test_unknown_model_names_near_folders(place: Path, tmp_path: Path) -> None:
    text = refused(
        2, "train", "--model", place / "brt", "--train", place / "train.csv", "--output", tmp_path / "o"
    )
    assert "brt does not exist" in text
    assert "bert" in text.partition("Near matches")[2]


def test_unknown_hub_model_says_what_can_be_named(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refused(
        2, "train", "--model", "no-such-model", "--train", place / "train.csv", "--output", tmp_path / "o"
    )
    assert "no-such-model" in text
    assert "minilm" in text


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("--method", "lort", "lotr"),
        ("--target-modules", "querry", "query"),
        ("--modes", "layers", "layer"),
        ("--target-modules", "[query", "regex"),
        ("--init", "orthonormall", "orthonormal"),
        ("--dtype", "floatt32", "float32"),
        ("--task", "clasification", "classification"),
        ("--report-to", "tensorbord", "none"),
        ("--target-modules", "x.*y", "encoder.layer.0"),
        ("--max-length", "65", "64 tokens"),
    ],
)
def test_unknown_names_show_near_matches(
    place: Path, tmp_path: Path, option: str, value: str, near: str
) -> None:
    text = refused(2, *training(place), option, value, "--output", tmp_path / "o")
    assert value in text
    assert near in text.partition(value)[2]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("rank", ["0", "-4", "four", "4,4,4"])
def test_rank_that_is_none_is_refused(place: Path, tmp_path: Path, rank: str) -> None:
    assert "rank" in refused(2, *training(place), f"--rank={rank}", "--output", tmp_path / "o")


def test_rank_above_the_block_is_cut_to_it(place: Path) -> None:
    planned = [json.loads(lotr("plan", place / "bert", "--rank", n, "--json").stdout) for n in ("32", "40")]
    assert planned[0]["trained_numbers"] == planned[1]["trained_numbers"]


def test_sharing_that_cannot_be_names_blocks_and_the_way_out(tmp_path: Path) -> None:
    llama = saved_models.save_llama(tmp_path / "llama")
    targets = ("--target-modules", "q_proj,down_proj")
    text = refused(2, "plan", llama, "--modes", "layer,projection", *targets)
    assert "q_proj|down_proj" in text
    assert "(32, 32) and (32, 64)" in text
    assert 'drop "projection" from modes' in text and 'blocks="head"' in text


def test_usage_errors_exit_with_two(place: Path, tmp_path: Path) -> None:
    assert lotr("train", "--no-such-option").exit_code == 2
    assert lotr("no-such-command").exit_code == 2
    assert "--model" in refused(2, "train", "--train", "x.csv", "--output", tmp_path / "o")
    (tmp_path / "c.yaml").write_text("rnak: 3\n")
    assert "rank" in refused(2, "train", "--config", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("epochs: many\n")
    assert "epochs" in refused(2, "train", "--config", tmp_path / "c.yaml")


def test_output_that_is_not_empty_is_kept_without_overwrite(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    text = refused(2, *training(place), "--output", tmp_path, "--max-steps", "1", "--rank", "2")
    assert "--overwrite" in text
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (
        lotr(
            *training(place), "--output", tmp_path, "--max-steps", "1", "--rank", "2", "--overwrite"
        ).exit_code
        == 0
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nan_stops_the_run_says_where_and_keeps_the_last_good_checkpoint(place: Path, tmp_path: Path) -> None:
    rates = (
        "--lr",
        "1e30",
        "--core-lr",
        "1e30",
        "--head-lr",
        "1e30",
        "--warmup",
        "0.9",
        "--head-warmup",
        "0",
    )
    words = (*training(place), *rates, "--max-steps", "20", "--eval-steps", "1", "--rank", "2")
    text = refused(1, *words, "--output", tmp_path / "o")
    assert "at step" in text
    assert not (tmp_path / "o" / WEIGHTS).exists()
    kept = sorted((tmp_path / "o" / "checkpoints").glob("checkpoint-*"))
    assert kept
    assert kept[-1].name in text
    assert all(torch.isfinite(t).all() for path in kept for t in load_file(path / WEIGHTS).values())


def test_missing_adapter_names_near_folders(place: Path) -> None:
    text = refused(1, "evaluate", place / "adaptr", "--data", place / "train.csv")
    assert "adapter" in text.partition("Near matches")[2]


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(place: Path, adapter: Path, keep: int) -> None:
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:keep])
    for command in (("evaluate", adapter, "--data", place / "train.csv"), ("inspect", adapter)):
        assert "truncated or damaged" in refused(1, *command)


def test_corrupted_header_is_refused(place: Path, adapter: Path) -> None:
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[8:40] = b"\xff" * 32
    (adapter / WEIGHTS).write_bytes(bytes(content))
    assert "truncated or damaged" in refused(1, "evaluate", adapter, "--data", place / "train.csv")


def test_a_flipped_byte_among_the_numbers_is_refused(place: Path, adapter: Path) -> None:
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (adapter / WEIGHTS).write_bytes(bytes(content))
    assert "checksum" in refused(1, "evaluate", adapter, "--data", place / "train.csv")


def forget_checksum(adapter: Path) -> None:
    task = json.loads((adapter / "task.json").read_text())
    del task["weights_sha256"]
    (adapter / "task.json").write_text(json.dumps(task))


def test_missing_and_unexpected_keys_are_refused(place: Path, adapter: Path) -> None:
    forget_checksum(adapter)
    tensors = load_file(adapter / WEIGHTS)
    core = next(key for key in tensors if "lotr_C" in key)
    save_file({key: value for key, value in tensors.items() if key != core}, adapter / WEIGHTS)
    text = refused(1, "evaluate", adapter, "--data", place / "train.csv")
    assert "missing" in text
    assert "query" in text
    assert "not whole" in refused(1, "export", adapter, "--output", adapter.parent / "lora")


def test_shapes_that_do_not_fit_are_refused(place: Path, adapter: Path) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 3}))
    text = refused(1, "evaluate", adapter, "--data", place / "train.csv")
    assert "does not fit" in text
    assert "size mismatch" in text
    assert "is not the one that was saved with it" in text
    assert "name that one with --model" not in text


@pytest.mark.parametrize(
    "change", [{"method": "lort"}, {"r": 0}, {"modes": ["depth"]}, {"peft_type": "NONE"}]
)
def test_configuration_that_does_not_hold_is_refused(place: Path, adapter: Path, change: dict) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **change}))
    result = lotr("evaluate", adapter, "--data", place / "train.csv")
    assert result.exit_code in (1, 2)
    assert "Unexpected" not in result.stderr, result.stderr
    (adapter / CONFIG).write_text("{")
    assert "damaged" in refused(1, "evaluate", adapter, "--data", place / "train.csv")


def test_another_base_model_is_refused(place: Path, adapter: Path, tmp_path: Path) -> None:
    saved_models.save_bert(tmp_path / "other", seed=1)
    text = refused(1, "evaluate", adapter, "--data", place / "train.csv", "--model", tmp_path / "other")
    assert "fingerprint" in text
    assert "bert" in text
    saved_models.save_bert(tmp_path / "deeper", layers=3)
    text = refused(1, "evaluate", adapter, "--data", place / "train.csv", "--model", tmp_path / "deeper")
    assert "does not fit" in text


def test_a_head_alone_belongs_to_its_base_and_has_no_lora(place: Path, tmp_path: Path) -> None:
    done = lotr(*training(place), "--method", "head", "--max-steps", "1", "--output", tmp_path / "head")
    assert done.exit_code == 0, done.stderr
    saved_models.save_bert(tmp_path / "other", seed=1)
    words = ("--data", place / "train.csv", "--model", tmp_path / "other")
    assert "fingerprint" in refused(1, "evaluate", tmp_path / "head", *words)
    assert "head alone" in refused(1, "export", tmp_path / "head", "--output", tmp_path / "lora")
    assert "head alone" in refused(1, "inspect", tmp_path / "head")


def test_overwriting_keeps_other_files_and_never_the_source(adapter: Path, tmp_path: Path) -> None:
    before = (adapter / WEIGHTS).read_bytes()
    refused(2, "export", adapter, "--output", adapter, "--overwrite")
    assert (adapter / WEIGHTS).read_bytes() == before
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    assert lotr("export", adapter, "--output", tmp_path / "lora", "--overwrite").exit_code == 0
    assert (tmp_path / "lora" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "lora" / WEIGHTS).is_file()


def test_predictions_change_nothing_in_the_rows(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,id,price\nred thing,1234567890123456789,1.50\n")
    words = ("predict", adapter, "--data", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert lotr(*words).exit_code == 0
    assert "red thing,1234567890123456789,1.50," in (tmp_path / "out.csv").read_text()
    (tmp_path / "in.csv").write_text("text,prediction\nred thing,mine\n")
    assert "prediction" in refused(1, *words, "--overwrite")


def test_pickled_weights_are_never_read(place: Path, adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    assert "never read" in refused(1, "evaluate", adapter, "--data", place / "train.csv")


def test_debug_shows_the_traceback(place: Path) -> None:
    result = lotr("--debug", "evaluate", place / "nowhere", "--data", place / "train.csv")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_exported_lora_is_not_taken_for_a_lotr_adapter(place: Path, tmp_path: Path) -> None:
    assert lotr("export", place / "adapter", "--output", tmp_path / "lora").exit_code == 0
    assert "LORA" in refused(1, "inspect", tmp_path / "lora")


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
