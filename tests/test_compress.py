"""`lotr.compress`: many LoRAs become one bank that answers as they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import lotr
from conftest import bert, tokens
from loras import dense, lora, on_one_basis


def test_a_bank_answers_as_the_adapters_on_one_basis_did(tmp_path: Path) -> None:
    """Each with its own head; in one batch."""
    folders = on_one_basis(tmp_path, tasks=5, rank=4, task_type="SEQ_CLS")
    report = lotr.compress(folders, tmp_path / "bank", bert(), rank=4, dtype="float32")
    assert report["error"] < 1e-5
    bank = lotr.CoreBank.open(tmp_path / "bank")
    assert list(bank.names()) == [folder.name for folder in folders]
    model = bank.wrap(bert())
    with torch.no_grad():
        logits = model(input_ids=tokens(5), task_ids=list(bank.names())).logits
    own = torch.stack([_with(folder, tokens(5)[n : n + 1])[0] for n, folder in enumerate(folders)])
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)


def _with(folder: Path, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(bert(), str(folder)).eval()(input_ids=batch).logits


@pytest.mark.parametrize("modes", [("task",), ("task", "layer"), ("task", "layer", "projection")])
def test_the_reported_error_is_that_of_the_dense_updates(modes: tuple[str, ...], tmp_path: Path) -> None:
    """Also where factors are shared along layers; ranks are mixed, and one adapter lacks a module."""
    originals = [
        lora(tmp_path / "a", 0, r=3),
        lora(tmp_path / "b", 1, r=5, use_rslora=True),
        lora(tmp_path / "c", 2, r=2, target_modules=["query"], rank_pattern={"layer.1.*query": 4}),
    ]
    report = lotr.compress(
        [tmp_path / name for name in "abc"], tmp_path / "bank", bert(), rank=4, modes=modes, dtype="float32"
    )
    bank = lotr.CoreBank.open(tmp_path / "bank")
    for original, row in zip(originals, report["by_task"], strict=True):
        bank.export(row["task"], tmp_path / f"{row['task']}-out", as_lora=True)
        exported = PeftModel.from_pretrained(bert(), str(tmp_path / f"{row['task']}-out"))
        before, after = dense(original), dense(exported)
        assert before.keys() <= after.keys()
        lost = sum(((before.get(path, 0) - after[path]) ** 2).sum() for path in after)
        error = float((lost / sum((dW**2).sum() for dW in before.values())) ** 0.5)
        assert row["error"] == pytest.approx(error, rel=1e-4)
        assert row["missing"] == len(after) - len(before)
