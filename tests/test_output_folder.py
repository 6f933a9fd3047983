"""The output folder: what a run must not overwrite, what it leaves when it fails, what of an earlier run goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import saved_models
from lotr.errors import ConfigError, Interrupted
from lotr.training import prepare as beginning
from lotr.training.checkpoint import TRAINER_STATE
from lotr.training.output import CURVE, METRICS, PICTURES
from lotr.training.run import train
from lotr.training.settings import TrainSettings
from lotr_cli.app import app
from test_training import CtrlC, quiet

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "train.csv", rows=48)
    train(settings(folder, folder / "first", init="gradient", start_batches=2, max_steps=1), say=quiet)
    return folder


def settings(place: Path, output: Path, **more: object) -> TrainSettings:
    given = {"rank": "2", "max_steps": 6, "batch_size": 8, "eval_steps": 2, **more}
    return TrainSettings(
        model=str(place / "bert"), train=str(place / "train.csv"), output=str(output), **given
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["first", "bert/../first", "link", "bert"])
def test_a_run_does_not_overwrite_what_it_is_trained_on(place: Path, where: str) -> None:
    if where == "link" and not (place / "link").is_symlink():
        (place / "link").symlink_to(place / "first")
    before = _files(place)
    asked = settings(place, place / where, overwrite=True, rank="16", basis=str(place / "first"))
    with pytest.raises(ConfigError, match="would be overwritten"):
        train(asked, say=quiet)
    assert _files(place) == before


def test_a_basis_among_the_checkpoints_that_a_run_removes_is_refused(place: Path, tmp_path: Path) -> None:
    kept = tmp_path / "o" / "checkpoints" / "checkpoint-2"
    kept.parent.mkdir(parents=True)
    (place / "first").rename(kept)
    try:
        asked = settings(place, tmp_path / "o", overwrite=True, rank="16", basis=str(kept))
        with pytest.raises(ConfigError, match="would be overwritten"):
            train(asked, say=quiet)
        assert (kept / WEIGHTS).is_file()
    finally:
        kept.rename(place / "first")


@pytest.mark.parametrize("command", ["export", "merge"])
@pytest.mark.parametrize("where", ["first", "second", "bert"])
def test_a_way_out_does_not_overwrite_what_it_reads(place: Path, command: str, where: str) -> None:
    if not (place / "second").exists():
        train(settings(place, place / "second", basis=str(place / "first"), max_steps=1), say=quiet)
    before = _files(place)
    words = [command, str(place / "second"), "--output", str(place / where), "--overwrite"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "would be overwritten" in " ".join(result.stderr.split())
    assert _files(place) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_that_blocks(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    existed: bool,
) -> None:
    if existed:
        (tmp_path / "o").mkdir()

    def fail(*args: object) -> None:
        assert (tmp_path / "o" / "checkpoints" / "settings.json").is_file()
        raise error

    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(beginning, "warm_head", fail)
        with pytest.raises(error):
            train(settings(place, tmp_path / "o", head_warmup=2), say=lines.append)
    assert (tmp_path / "o").exists() == existed and not _files(tmp_path)
    assert "nothing is left of this run" in lines[-1]
    train(settings(place, tmp_path / "o", max_steps=1), say=quiet)


def test_what_a_killed_run_left_before_its_first_checkpoint_blocks_nothing(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "o" / "checkpoints").mkdir(parents=True)
    (tmp_path / "o" / "checkpoints" / "settings.json").write_text("{}")
    train(settings(place, tmp_path / "o", max_steps=1), say=quiet)
    with pytest.raises(ConfigError, match="not empty"):
        train(settings(place, tmp_path / "o"), say=quiet)


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
        train(settings(place, tmp_path / "o", **begins), say=quiet, callbacks=[CtrlC(3)])
    saved = tmp_path / "o" / "checkpoints" / "checkpoint-4" / TRAINER_STATE
    state = json.loads(saved.read_text())
    (progress,) = (one for one in state["stateful_callbacks"].values() if "seconds" in one["attributes"])
    before = progress["attributes"]["seconds"]
    progress["attributes"]["seconds"] += 1000
    saved.write_text(json.dumps(state))
    report = train(output=str(tmp_path / "o"), resume=True, say=quiet)
    straight = train(settings(place, tmp_path / "straight", **begins), say=quiet)
    assert report.begun == straight.begun and report.begun["head_warmup"] == 1
    assert report.seconds > 1000 + before - 0.01


def test_pictures_of_an_earlier_adapter_go_when_the_new_one_is_whole(place: Path, tmp_path: Path) -> None:
    train(settings(place, tmp_path / "o", init="gradient", start_batches=2, max_steps=1), say=quiet)
    for name in PICTURES:
        (tmp_path / "o" / name).touch()
    (tmp_path / "o" / "notes.txt").touch()
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path / "o", overwrite=True), say=quiet, callbacks=[CtrlC(3)])
    assert all((tmp_path / "o" / name).is_file() for name in PICTURES)
    train(settings(place, tmp_path / "o", overwrite=True, max_steps=1), say=quiet)
    left = {path.name for path in (tmp_path / "o").iterdir()}
    assert not left & set(PICTURES) and {CURVE, METRICS, WEIGHTS, "notes.txt"} <= left
