"""The page on adding a method does what it says: its code is run here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from conftest import bert, tokens
from lotr import METHODS, LotrConfig, Method, export, inspect
from lotr.math.cores import CORES

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_method.md"

for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
    exec(compile(code, PAGE.name, "exec"), globals())  # defines ROW, ScaledCore and TestScaledCore

TARGETS = ["query", "value"]


def _trained(config: LotrConfig) -> PeftModel:
    model = get_peft_model(bert(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=torch.tensor([0, 1, 2, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def _through_everything(config: LotrConfig, folder: Path) -> None:
    """Save, load, inspect and merge; all answer alike."""
    model = _trained(config)
    expected = model(tokens()).logits.detach()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(bert(), folder)
    torch.testing.assert_close(loaded(tokens()).logits, expected, atol=1e-6, rtol=0)
    assert all(site.norm > 0 for site in inspect(folder).sites)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, expected, atol=2e-6, rtol=1e-5)


def _exports_alike(folder: Path) -> None:
    """Export the adapter to PEFT's LoRA, or DoRA; both answer alike."""
    export(folder / "adapter", folder / "lora")
    ours, lora = (PeftModel.from_pretrained(bert(), folder / name) for name in ("adapter", "lora"))
    torch.testing.assert_close(lora(tokens()).logits, ours(tokens()).logits, atol=2e-6, rtol=1e-5)


def test_a_new_row_needs_only_the_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row: Method = globals()["ROW"]
    monkeypatch.setitem(METHODS, row.name, row)
    _through_everything(LotrConfig(method="example", r=4, target_modules=TARGETS), tmp_path / "adapter")
    _exports_alike(tmp_path)


def test_a_new_core_needs_only_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(CORES, "scaled", globals()["ScaledCore"])
    config = LotrConfig(core="scaled", modes=("layer", "projection"), r=4, target_modules=TARGETS)
    _through_everything(config, tmp_path / "adapter")
    _exports_alike(tmp_path)
