"""Numbers that are not finite are refused by name by every reader, whoever wrote the file."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import lotr
from commands import CtrlC, quiet, refused, report, settings, training
from loras import lora
from lotr.errors import CheckpointError, Interrupted
from lotr.files.adapter_folder import BASIS_WEIGHTS, TASK, WEIGHTS, write_task
from lotr.training.checkpoint import OPTIMIZER
from lotr.training.run import train


@pytest.fixture(scope="module")
def folders(place: Path) -> Path:
    """Adapters as three programs write them, each beside one that is whole, and a bank."""
    report(*training(place), "--max-steps", 2, "--output", place / "lotr train")
    report(*training(place), "--max-steps", 2, "--method", "peft_lora", "--output", place / "peft_lora")
    shutil.copytree(place / "lotr train", place / "PEFT alone")
    (place / "PEFT alone" / TASK).unlink()
    whole = partial(AutoModelForSequenceClassification.from_pretrained, place / "bert", num_labels=3)
    for name in ("a LoRA of PEFT", "other"):
        lora(place / name, 0, whole, place / "bert", task_type="SEQ_CLS")
    report("bank", "create", place / "bank", "--basis", place / "lotr train")
    return place


def spoil(file: Path, odd: float, part: str = "") -> None:
    """Put a number that is none into a tensor whose name has a part."""
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    next(t for key, t in tensors.items() if part in key and t.is_floating_point()).view(-1)[-1] = odd
    save_file(tensors, file, metadata=about)
    if (file.parent / TASK).exists():  # whoever did so can write a checksum too
        write_task(file.parent, json.loads((file.parent / TASK).read_text()))


#: Who wrote an adapter, and the commands that read it; a dash is a blank.
READERS = {
    "lotr train": "evaluate predict merge inspect export bank-create compress bank-add",
    "peft_lora": "evaluate predict merge inspect compress",
    "PEFT alone": "inspect export bank-create compress bank-add",
    "a LoRA of PEFT": "evaluate predict merge inspect compress",
}


@pytest.mark.parametrize("writer, odd", zip(READERS, [math.nan, -math.inf] * 2, strict=True))
def test_an_adapter_is_refused_by_every_command(
    folders: Path, tmp_path: Path, writer: str, odd: float
) -> None:
    adapter = shutil.copytree(folders / writer, tmp_path / "adapter")
    spoil(adapter / WEIGHTS, odd)
    data, out = ("--data", folders / "dev.csv"), ("--output", tmp_path / "out.csv")
    words: dict[str, tuple[Any, ...]] = {
        "evaluate": (adapter, *data),
        "predict": (adapter, *data, *out),
        "merge": (adapter, *out),
        "inspect": (adapter,),
        "export": (adapter, *out),
        "bank-create": (tmp_path / "new", "--basis", adapter),
        "bank-add": (folders / "bank", adapter),
        "compress": (adapter, folders / "other", *out),
    }
    for name in READERS[writer].split():
        assert "not finite" in refused(1, *name.split("-"), *words[name]), name
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter"}


def test_a_basis_is_refused_by_what_reads_its_factors(folders: Path, tmp_path: Path) -> None:
    bank = shutil.copytree(folders / "bank", tmp_path / "bank")
    spoil(bank / BASIS_WEIGHTS, math.nan)
    report("bank", "add", bank, folders / "lotr train")  # for which the hash of the factors is enough
    assert "not finite" in refused(1, "bank", "export", bank, "lotr train", "--output", tmp_path / "out")
    base = AutoModelForSequenceClassification.from_pretrained(folders / "bert", num_labels=3)
    with lotr.CoreBank.open(bank) as opened, pytest.raises(CheckpointError, match="not finite"):
        opened.wrap(base)
    assert any("not finite" in line for line in opened.verify()["files"])


@pytest.mark.parametrize(
    "file, part", [(WEIGHTS, "lotr_C"), (WEIGHTS, "classifier"), (OPTIMIZER, "exp_avg_sq")]
)
def test_a_checkpoint_is_refused_by_the_run_that_goes_on(
    place: Path, tmp_path: Path, file: str, part: str
) -> None:
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path / "o"), say=quiet, callbacks=[CtrlC(4)])
    for checkpoint in (tmp_path / "o" / "checkpoints").glob("checkpoint-*"):
        spoil(checkpoint / file, math.inf, part)
    with pytest.raises(CheckpointError, match=rf"{file}.*not finite|not finite.*{file}"):
        train(output=str(tmp_path / "o"), resume=True, say=quiet)
