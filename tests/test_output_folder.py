"""The output folder: what a run must not overwrite, what it leaves when it fails, what of an earlier run goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, TrainerCallback

import lotr
from commands import CtrlC, quiet, refused, settings
from conftest import bert
from lotr import LotrConfig
from lotr.errors import ConfigError, Interrupted
from lotr.files.adapter_folder import read_adapter
from lotr.training import prepare
from lotr.training.checkpoint import TRAINER_STATE
from lotr.training.output import LOGS
from lotr.training.run import train
from lotr.training.trained import merge


@pytest.fixture(scope="module", autouse=True)
def _first(place: Path) -> None:
    train(settings(place, place / "first", init="gradient", start_batches=2, max_steps=1), say=quiet)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["first", "bert/../first", "link", "bert", "out"])
def test_a_run_does_not_overwrite_what_it_is_trained_on(place: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "link").symlink_to(place / "first")
    basis = place / "first"
    if where == "out":  # the basis lies among the checkpoints that a run removes
        basis = tmp_path / "out" / "checkpoints" / "checkpoint-2"
        shutil.copytree(place / "first", basis)
    output = (tmp_path if where in ("link", "out") else place) / where
    before = _files(place) | _files(tmp_path)
    with pytest.raises(ConfigError, match="would be overwritten"):
        train(settings(place, output, overwrite=True, rank=None, basis=str(basis)), say=quiet)
    assert _files(place) | _files(tmp_path) == before


@pytest.mark.parametrize("command", ["export", "merge"])
@pytest.mark.parametrize("where", ["first", "second", "bert"])
def test_a_way_out_does_not_overwrite_what_it_reads(place: Path, command: str, where: str) -> None:
    if not (place / "second").exists():
        train(
            settings(place, place / "second", basis=str(place / "first"), rank=None, max_steps=1), say=quiet
        )
    before = _files(place)
    text = refused(2, command, place / "second", "--output", place / where, "--overwrite")
    assert "would be overwritten" in text and _files(place) == before


def test_the_folder_of_the_shell_can_be_the_output(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lotr.export(place / "first", ".")
    assert Path("adapter_config.json").is_file() and Path.cwd().samefile(tmp_path)


def test_what_replaces_an_adapter_is_not_read_with_files_of_it(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(place / "first", out)
    (out / "notes.txt").touch()
    model = get_peft_model(bert(), LotrConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "plain")  # without a task.json
    lotr.export(tmp_path / "plain", out, overwrite=True)
    assert read_adapter(out).config["peft_type"] == "LORA"
    merge(place / "first", out, overwrite=True)
    assert type(AutoModelForSequenceClassification.from_pretrained(out)).__name__.startswith("Bert")
    left = {path.name for path in out.iterdir()}
    assert "notes.txt" in left and not any("adapter" in name for name in left)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_that_blocks(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existed: bool
) -> None:
    if existed:
        (tmp_path / "o").mkdir()

    def fail(*args: object) -> None:
        assert (tmp_path / "o" / "checkpoints" / "settings.json").is_file()
        raise error

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "warm_head", fail)
        with pytest.raises(error):
            train(settings(place, tmp_path / "o", head_warmup=2), say=lines.append)
    assert (tmp_path / "o").exists() == existed and not _files(tmp_path)
    assert "No checkpoint was written yet" in lines[-1]
    train(settings(place, tmp_path / "o", max_steps=1), say=quiet)


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_left_before_its_first_checkpoint_blocks_nothing(
    place: Path, tmp_path: Path, resume: bool
) -> None:
    asked = settings(place, tmp_path / "o", max_steps=1)
    (tmp_path / "o" / "checkpoints").mkdir(parents=True)
    (tmp_path / "o" / "checkpoints" / "settings.json").write_text(json.dumps(asked.to_dict()))
    again = {"output": asked.output, "resume": True} if resume else vars(asked)
    assert train(**again, say=quiet).steps == 1


def test_an_adapter_does_not_go_into_the_folder_of_a_bank(place: Path, tmp_path: Path) -> None:
    from lotr import CoreBank

    CoreBank.create(tmp_path / "bank", str(place / "first")).close()
    before = _files(tmp_path)
    with pytest.raises(ConfigError, match="is a bank"):
        train(settings(place, tmp_path / "bank", overwrite=True), say=quiet)
    assert _files(tmp_path) == before


def test_a_run_that_goes_on_knows_how_it_began_and_how_long_it_took(place: Path, tmp_path: Path) -> None:
    begins = {"init": "gradient", "start_batches": 2, "head_warmup": 1}
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path / "o", **begins), say=quiet, callbacks=[CtrlC(4)])
    saved = tmp_path / "o" / "checkpoints" / "checkpoint-5" / TRAINER_STATE
    state = json.loads(saved.read_text())
    (progress,) = (one for one in state["stateful_callbacks"].values() if "seconds" in one["attributes"])
    before = progress["attributes"]["seconds"]
    progress["attributes"]["seconds"] += 1000
    saved.write_text(json.dumps(state))
    report = train(output=str(tmp_path / "o"), resume=True, say=quiet)
    straight = train(settings(place, tmp_path / "straight", **begins), say=quiet)
    assert report.begun == straight.begun and report.begun["head_warmup"] == 1
    assert report.seconds > 1000 + before - 0.01 and report.resumed_at == [5]


def test_what_loggers_write_is_kept_with_the_adapter(place: Path, tmp_path: Path) -> None:
    class Logger(TrainerCallback):
        def on_log(self, args, state, control, **kwargs) -> None:
            (Path(args.output_dir) / LOGS).mkdir(exist_ok=True)
            (Path(args.output_dir) / LOGS / "events").touch()

    train(settings(place, tmp_path / "o", max_steps=1), say=quiet, callbacks=[Logger()])
    assert (tmp_path / "o" / LOGS / "events").is_file() and not (tmp_path / "o" / "checkpoints").exists()


def test_a_logger_that_is_not_installed_is_named_with_its_command(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "get_available_reporting_integrations", list)
    for name, says in (
        ("wandb", "pip install wandb"),
        ("comet_ml", "pip install comet-ml"),
        ("wandbb", "Near"),
    ):
        with pytest.raises(ConfigError, match=says):
            train(settings(place, tmp_path / "o", report_to=name), say=quiet)
    assert not (tmp_path / "o").exists()
