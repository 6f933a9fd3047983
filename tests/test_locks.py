"""One run at a time writes a folder; a deleted folder is noticed; a killed run leaves neither a lock nor files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import banks
import loras
import lotr
from commands import CtrlC, quiet, refused, settings, training
from conftest import bert, tokens
from lotr.errors import CheckpointError, ConfigError, Interrupted
from lotr.files.atomic import locked, whole_folder
from lotr.training.run import train
from test_bank_processes import in_a_fork


def test_a_killed_process_leaves_no_lock_and_the_next_one_no_files(tmp_path: Path) -> None:
    run, new = tmp_path / "run", tmp_path / "new"

    def keep(tell: Callable[[Any], None]) -> None:
        with locked(run), whole_folder(new) as made:
            (made / "half").touch()
            tell("begun")
            time.sleep(600)

    other, told = in_a_fork(keep)
    assert told.recv() == "begun"
    for enter, name in ((locked(run), "run"), (whole_folder(new), "new")):
        with pytest.raises(ConfigError, match=rf"Another run is writing \S+/{name}\. Wait"), enter:
            pass
    other.kill()
    other.join()
    with locked(run), whole_folder(new) as made:
        (made / "whole").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "run", "whole"]


def test_a_folder_that_was_made_for_a_lock_goes_with_it_unless_it_is_used(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_two_runs_do_not_train_into_one_folder(place: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path / "o"), say=quiet, callbacks=[CtrlC(4)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with locked(tmp_path / "o"):
        for words in ((*training(place), "--overwrite"), ("train", "--resume")):
            assert "Another run is writing" in refused(2, *words, "--output", tmp_path / "o")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert train(output=str(tmp_path / "o"), resume=True, say=quiet).steps == 10


def test_two_runs_do_not_compress_into_one_bank(tmp_path: Path) -> None:
    adapters = loras.on_one_basis(tmp_path, tasks=2, rank=2)
    with whole_folder(tmp_path / "bank"), pytest.raises(ConfigError, match="Another run is writing"):
        lotr.compress(adapters, tmp_path / "bank", bert(), rank=2)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_open_bank_notices_that_its_folder_was_deleted(tmp_path: Path, replaced: bool) -> None:
    bank = banks.bank(tmp_path, tasks=1)
    wrapped = bank.wrap(bert())
    wrapped(input_ids=tokens(1), task_ids=["task-0"])
    shutil.copytree(tmp_path / "bank", tmp_path / "copy")
    shutil.rmtree(tmp_path / "bank")
    if replaced:
        (tmp_path / "copy").rename(tmp_path / "bank")
    for use in (
        lambda: bank.get("task-0"),
        lambda: bank.add(banks.task(bank, "new")),
        lambda: wrapped(input_ids=tokens(1), task_ids=["task-0"]),
    ):
        with pytest.raises(CheckpointError, match="was removed or replaced while the bank was open"):
            use()
