"""The command line: every command on small saved models, in this process."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
import typer.core
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

import banks
import saved_models
from commands import QUICK, app, lotr, refused, report, training
from conftest import painted
from lotr import METHODS, LotrConfig
from lotr.files.adapter_folder import WEIGHTS
from lotr.training.output import METRICS
from lotr_cli.reports import write_rows


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, dict]:
    with painted():
        return place / "adapter", report(*training(place), "--output", place / "adapter", *QUICK)


def test_training_learns_and_tells_what_it_did(trained) -> None:
    folder, result = trained
    assert result["accuracy"] > 0.9
    assert json.loads((folder / METRICS).read_text())["accuracy"] == result["accuracy"]
    counts = ("trained_numbers", "adapter_bytes", "steps", "seconds", "peak_memory_bytes")
    assert all(result[name] for name in ("metric", "settings", *counts))
    assert torch.__version__.startswith(result["versions"]["torch"])  # a build adds its local name
    assert result["settings"]["rank"] == "4"


def test_trained_numbers_are_those_in_the_file(trained) -> None:
    folder, result = trained
    tensors = load_file(folder / WEIGHTS)
    ours = sum(t.numel() for name, t in tensors.items() if ".lotr_" in name)
    assert result["trained_numbers"]["adapter"] == ours == 2 * (32 * 4 * 2) + 4 * 16
    assert result["trained_numbers"]["head"] == sum(t.numel() for t in tensors.values()) - ours


def test_everything_promised_is_written_and_nothing_else(trained) -> None:
    names = {path.name for path in trained[0].iterdir()} - {"confusion.png", "cores.png"}
    records = {"adapter_config.json", "metrics.json", "settings.json", "task.json"}
    assert names == {"README.md", "adapter_model.safetensors", "curve.png", *records}


def test_model_card_says_how_to_load_and_how_it_was_trained(trained) -> None:
    card = (trained[0] / "README.md").read_text()
    rates = "- learning rates: factors 0.03, cores 0.03, head 0.03\n"
    for words in ("import lotr", "lotr export", "AutoPeftModelForSequenceClassification", rates):
        assert words in card


def test_evaluation_of_the_saved_adapter_gives_the_score_of_the_run(trained, place: Path) -> None:
    folder, result = trained
    with painted():
        again = report("evaluate", folder, "--data", place / "dev.csv")
    assert again["accuracy"] == result["accuracy"]
    assert sum(map(sum, again["confusion"])) == 48
    for picture in (Path(again["picture"]), folder / "curve.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_predictions_are_the_rows_with_an_answer_each(trained, place: Path) -> None:
    output = place / "predictions.csv"
    assert report("predict", trained[0], "--data", place / "dev.csv", "--output", output)["rows"] == 48
    with output.open() as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == pytest.approx(trained[1]["accuracy"])
    assert all(1 / 3 <= float(row["confidence"]) <= 1 for row in rows)
    with (place / "dev.csv").open() as file:
        assert [row["text"] for row in rows] == [row["text"] for row in csv.DictReader(file)]


def test_predict_needs_no_labels_and_keeps_an_output_that_exists(trained, place: Path) -> None:
    (place / "new.csv").write_text("text\nthe red thing\na blue thing\n")
    words = ("predict", trained[0], "--data", place / "new.csv", "--output", place / "new.jsonl")
    assert report(*words)["rows"] == 2
    rows = [json.loads(line) for line in (place / "new.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["the red thing", "a blue thing"]
    assert "--overwrite" in refused(2, *words)


def test_plan_reads_no_weights_and_foretells_the_file(place: Path, trained, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((place / "bert" / "config.json").read_text())
    plan = report("plan", tmp_path, "--rank", "4")
    _, result = trained
    assert plan["trained_numbers"] == result["trained_numbers"]["adapter"]
    table = lotr("plan", tmp_path, "--rank", "4").stdout
    assert "query_32x32" in table and "is cut" not in table
    assert "Rank 40 is cut" in lotr("plan", tmp_path, "--rank", "40").stdout


def test_plan_on_a_basis_has_its_method_and_rank(place: Path, tmp_path: Path) -> None:
    banks.basis(tmp_path / "basis", method="lotr_joint", r=(3, 2), task_type=None)
    plan = report("plan", place / "bert", "--basis", tmp_path / "basis")
    assert (plan["method"], plan["rank"]) == ("lotr_joint", "3,2")


def test_plan_foretells_the_bytes_of_an_adapter_without_a_head(place: Path, tmp_path: Path) -> None:
    plan = report("plan", place / "bert", "--rank", "4", "--target-modules", "all-linear")
    config = LotrConfig(r=4, target_modules="all-linear")
    get_peft_model(AutoModel.from_pretrained(place / "bert"), config).save_pretrained(tmp_path)
    assert plan["bytes"] == (tmp_path / WEIGHTS).stat().st_size


def test_inspect_reports_the_norm_of_the_dense_update(trained) -> None:
    folder, _ = trained
    with painted():
        inspected = report("inspect", folder)
    tensors = load_file(folder / WEIGHTS)
    root = "base_model.model."
    for site in inspected["sites"]:
        U, Vt = (tensors[f"{root}lotrbasis.{site['group']}.lotr_{part}.weight"] for part in "UV")
        dense = U @ tensors[f"{root}{site['module']}.lotr_C.weight"] @ Vt
        assert site["norm"] == pytest.approx(float(dense.norm()), rel=1e-4)
        assert 1 <= site["rank"] <= 4 + 1e-6
    assert Path(inspected["picture"]).read_bytes().startswith(b"\x89PNG")


def test_merged_model_is_plain_and_answers_alike(trained, place: Path) -> None:
    lotr_model = AutoPeftModelForSequenceClassification.from_pretrained(trained[0], num_labels=3).eval()
    report("merge", trained[0], "--output", place / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(place / "merged").eval()
    ids = torch.randint(3, 20, (4, 9))
    assert not [name for name, _ in plain.named_parameters() if "lotr" in name]
    torch.testing.assert_close(plain(ids).logits, lotr_model(ids).logits, rtol=1e-4, atol=1e-5)
    assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_exported_lora_answers_alike(trained, place: Path) -> None:
    result = report("export", trained[0], "--output", place / "exported")
    assert result["modules"] == 4
    models = [
        AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
        for folder in (trained[0], place / "exported")
    ]
    assert [model.peft_config["default"].peft_type for model in models] == ["LOTR", "LORA"]
    ours, theirs = (model(torch.arange(3, 12).repeat(2, 1)).logits for model in models)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method", ["peft_lora", "peft_dora", "head", "tenslora_att", "metatt_5d", "bora", "lora_xs"]
)
def test_peers_a_bare_head_and_rows_train_through_the_same_command(place: Path, method: str) -> None:
    words = (*QUICK, "--epochs", "1", "--method", method, "--output", place / method)
    result = report(*training(place), *words)
    again = report("evaluate", place / method, "--data", place / "dev.csv")
    assert again["accuracy"] == pytest.approx(result["accuracy"])
    assert (result["trained_numbers"]["adapter"] == 0) == (method == "head")


def test_config_file_holds_any_setting_and_options_win(place: Path) -> None:
    config = place / "train.yaml"
    data = f"model: {place / 'bert'}\ntrain: {place / 'train.csv'}\noutput: {place / 'yaml'}\n"
    config.write_text(f"{data}rank: 2\nlr: 1e-2\nmax-steps: 3\n")
    result = report("train", "--config", config, "--rank", "3")
    assert (result["settings"]["rank"], result["settings"]["lr"], result["steps"]) == ("3", 0.01, 3)


def test_a_regression_runs_through(place: Path, tmp_path: Path) -> None:
    lines = [f"{'red ' * (n % 5 + 1)}thing,{n % 5 + 0.5}\n" for n in range(60)]
    (tmp_path / "scores.csv").write_text("text,label\n" + "".join(lines))
    words = ("--model", place / "bert", "--train", tmp_path / "scores.csv", "--output", tmp_path / "o")
    result = report("train", *words, *QUICK)
    assert result["metric"] == "pearson" and result["pearson"] > 0.8
    assert report("evaluate", tmp_path / "o", "--data", tmp_path / "scores.csv")["pearson"] > 0.8


def test_a_language_model_learns_conversations_and_answers(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"the {c} thing"}, {"role": "assistant", "content": c}]}
        for c in saved_models.COLOURS
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chats * 12))
    words = ("--model", saved_models.save_llama(tmp_path / "llama"), "--train", data, *QUICK, "--rank", "16")
    words = (*words, "--epochs", "12", "--target-modules", "all-linear", "--output", tmp_path / "chat")
    result = report("train", *words)
    assert result["metric"] == "loss" and result["loss"] < 1.0
    assert report("evaluate", tmp_path / "chat", "--data", data)["perplexity"] < 3

    (tmp_path / "dialogs.jsonl").write_text(data.read_text().replace("messages", "dialog"))
    words = ("--text", "dialog", "--output", tmp_path / "a.jsonl", "--max-new-tokens", "1")
    assert report("predict", tmp_path / "chat", "--data", tmp_path / "dialogs.jsonl", *words)["rows"] == 36
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    right = [row["prediction"].strip() == row["dialog"][1]["content"] for row in answers]
    assert sum(right) > len(right) / 2


def test_rows_with_other_columns_are_written_side_by_side(tmp_path: Path) -> None:
    """As where some tasks of a bank are regressions."""
    rows = [{"text": "a", "prediction": 0.5}, {"text": "b", "prediction": "x", "confidence": 0.9}]
    write_rows(rows, tmp_path / "o.csv")
    with (tmp_path / "o.csv").open(newline="") as file:
        assert [row["confidence"] for row in csv.DictReader(file)] == ["", "0.9"]


@pytest.mark.parametrize("name", ["o.csv", "o.jsonl"])
def test_half_a_character_is_written_as_json_escapes_it(tmp_path: Path, name: str) -> None:
    write_rows([{"id": "\ud800", "prediction": "a"}], tmp_path / name)
    text = (tmp_path / name).read_text()
    assert "\\ud800" in text and [path.name for path in tmp_path.iterdir()] == [name]
    assert name == "o.csv" or json.loads(text)["id"] == "\ud800"


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert lotr("--version").stdout.strip() == version("lotr")


def test_methods_lists_every_row_with_its_paper() -> None:
    listed = json.loads(lotr("methods", "--json").stdout)
    assert listed.keys() == METHODS.keys()
    assert all(row["url"].startswith("https://") for row in listed.values())


def test_help_needs_no_torch_and_a_plan_no_libraries_of_data_scores_or_pictures(place: Path) -> None:
    script = f"""
import sys
from lotr_cli.app import app
def run(*commands):
    for words in commands:
        try:
            app(words)
        except SystemExit:
            pass
run(["--help"], ["train", "--help"], ["methods"], ["train", "--config", "no.yaml"])
assert not {{"torch", "transformers", "peft", "lotr"}} & set(sys.modules)
from lotr import ConfigError, TrainSettings
assert ConfigError is sys.modules["lotr.errors"].ConfigError
assert TrainSettings is sys.modules["lotr.training.settings"].TrainSettings
from transformers import PreTrainedModel  # which brings sklearn and pandas in older versions
before = set(sys.modules)
run(["plan", {str(place / "bert")!r}])
assert not {{"datasets", "sklearn", "matplotlib", "pandas", "transformers.trainer"}} & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def _commands(program, *before: str) -> Iterator[tuple[tuple[str, ...], typer.core.TyperCommand]]:
    for name, command in program.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from _commands(command, *before, name)
        else:
            yield (*before, name), command


def test_every_command_ends_its_help_with_examples_that_the_program_takes() -> None:
    commands = dict(_commands(typer.main.get_command(app)))
    assert {("train",), ("methods",), ("bank", "create")} <= commands.keys()
    for names, command in commands.items():
        assert f"lotr {' '.join(names)}" in lotr(*names, "--help").stdout.rpartition("Example")[2], names
        for example in re.findall(r"`lotr (.*?)`", command.epilog):
            words = shlex.split(example, comments=True)
            assert tuple(words[: len(names)]) == names
            # raises where an option or a value is not known
            command.make_context(names[-1], words[len(names) :])
