"""Adapters in clusters, each with factors of its own, in one bank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lotr
from conftest import bert, tokens
from loras import assert_answers, edit, lora, on_one_basis
from lotr import CoreBank, Task
from lotr.compression.add import add
from lotr.errors import Interrupted
from lotr.files.atomic import CHECKSUM, sealed


def three_kinds(folder: Path, each: int = 4, rank: int = 3, **fields: Any) -> list[Path]:
    """Save LoRAs of three subspaces; in the order of their names the kinds alternate."""
    folders = []
    for kind in range(3):
        torch.manual_seed(kind)
        for n, path in enumerate(on_one_basis(folder / f"kind-{kind}", each, rank, **fields)):
            folders.append(path.rename(folder / f"task-{n}-{kind}"))
    return sorted(folders)


@pytest.mark.parametrize("size", [{"rank": 3}, {"max_error": 1e-3}, {"max_bytes": "70kB"}])
def test_adapters_of_three_subspaces_are_told_apart_and_kept_exactly(
    size: dict[str, Any], tmp_path: Path
) -> None:
    """One basis of as many bytes loses more; a task keeps the numbers of its cluster alone."""
    folders = three_kinds(tmp_path)
    report = lotr.compress(folders, tmp_path / "bank", bert(), clusters=3, dtype="float32", **size)
    clusters = {row["task"]: row["cluster"] for row in report.by_task}
    assert len({(name[-1], cluster) for name, cluster in clusters.items()}) == 3
    assert report.error < 2e-3
    one = lotr.compress(folders, tmp_path / "one", bert(), max_bytes=report.bytes_of_numbers, dtype="float32")
    assert one.error > 0.1
    bank = CoreBank.open(tmp_path / "bank")
    assert bank.stats()["bytes_of_numbers"] == sum(bank.about(name)["bytes"] for name in bank.names())
    assert bank.stats()["bytes_of_numbers"] + bank.plan.n_factors * 4 == report.bytes_of_numbers
    assert bank.verify()["ok"]
    model = bank.wrap(bert(), capacity=12)
    with torch.no_grad():  # a batch of all, tasks of three clusters beside the base
        together = model(input_ids=tokens(13), task_ids=[None, *bank.names()]).logits
        for n, folder in enumerate(folders, start=1):
            alone = (
                PeftModel.from_pretrained(bert(), str(folder)).eval()(input_ids=tokens(13)[n : n + 1]).logits
            )
            torch.testing.assert_close(together[n : n + 1], alone, rtol=2e-3, atol=2e-3)
    assert all(task.numbers.numel() < bank.layout.size for task in model.tasks.find(list(bank.names())))
    for folder in folders[:3]:
        assert_answers(tmp_path / "bank", folder.name, folder, tol=2e-3)


@pytest.mark.parametrize("core", ["free", "diagonal"])
def test_a_cluster_is_exported_alone_and_later_adapters_find_theirs(core: str, tmp_path: Path) -> None:
    folders = three_kinds(tmp_path, each=5)
    given: dict[str, Any] = {"rank": 3} if core == "free" else {"max_error": 0.05}
    early, late = folders[:12], folders[12:]
    bank = tmp_path / "bank"
    report = lotr.compress(early, bank, bert(), clusters=3, core=core, dtype="float32", **given)
    ranks = {tuple(group["ranks"]) for group in report.groups}
    assert len(report.groups) == 3 * len({group["group"] for group in report.groups})
    if core == "free":
        assert ranks == {(3, 3)}
        added = add(bank, late)["added"]
        assert max(added.values()) < 1e-5
    with CoreBank.open(bank) as opened:
        model = opened.wrap(bert())
        for as_lora in (False, True):
            out = tmp_path / f"out-{as_lora}"
            written = opened.export(early[1].name, out, as_lora=as_lora)
            if not as_lora:  # and in again
                again = opened.from_adapter("again", out)
                assert torch.equal(again.numbers, opened.get(early[1].name).numbers)
            own = PeftModel.from_pretrained(bert(), str(out)).eval()
            with torch.no_grad():
                torch.testing.assert_close(
                    own(input_ids=tokens(2)).logits,
                    model(input_ids=tokens(2), task_ids=[early[1].name] * 2).logits,
                    rtol=1e-4,
                    atol=1e-5,
                )
            if as_lora:
                assert written["rank"] <= max(map(max, ranks))


def test_auto_takes_clusters_where_they_pay_and_one_basis_where_they_do_not(tmp_path: Path) -> None:
    folders = three_kinds(tmp_path / "apart", each=6)
    apart = lotr.compress(folders, tmp_path / "a", bert(), rank=4, clusters="auto")
    together = lotr.compress(folders, tmp_path / "c", bert(), rank=4)
    assert {row["cluster"] for row in apart.by_task} == {0, 1, 2}
    assert apart.bytes_of_numbers <= together.bytes_of_numbers and apart.error < 0.6 * together.error
    one = lotr.compress(on_one_basis(tmp_path / "one", 6, 3), tmp_path / "b", bert(), rank=3, clusters="auto")
    assert {row["cluster"] for row in one.by_task} == {0}
    assert json.loads((tmp_path / "b" / "bank.json").read_text())["clusters"] == []


def test_the_order_of_adapters_does_not_change_the_clusters(tmp_path: Path) -> None:
    folders = [lora(tmp_path / f"task-{n}", n) and tmp_path / f"task-{n}" for n in range(7)]
    reports = [
        lotr.compress(order, tmp_path / f"bank-{n}", bert(), rank=2, clusters=2)
        for n, order in enumerate((folders, folders[::-1]))
    ]
    assert reports[0].by_task == [pytest.approx(row) for row in reports[1].by_task]


def test_a_task_of_all_clusters_is_kept_whole_and_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    lotr.compress(three_kinds(tmp_path, each=2), tmp_path / "bank", bert(), rank=2, clusters=3)
    with CoreBank.open(tmp_path / "bank", writable=True) as bank:
        numbers = torch.randn(bank.layout.size).bfloat16().float()
        bank.add(Task("trained", numbers))
        assert torch.equal(bank.get("trained").numbers, numbers)
        name = next(iter(bank.names()))
        record = bank.store.read(name)
        with bank.store.database.transaction():
            bank.store.write(replace(record, about=record.about.replace('"cluster": ', '"cluster": 7')), True)
        assert [task["task"] for task in bank.verify()["damaged"]] == [name]
    content = json.loads((tmp_path / "bank" / "bank.json").read_text())
    del content[CHECKSUM]
    content["clusters"] = content["clusters"] * 2
    sealed_anew = sealed(content, tmp_path / "bank" / "adapter_config.json")
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(sealed_anew))
    with pytest.raises(lotr.CheckpointError, match="clusters"):
        CoreBank.open(tmp_path / "bank")


@pytest.mark.parametrize("core", ["free", "diagonal"])
@pytest.mark.parametrize("size", [{"rank": 30}, {"max_bytes": "5MB"}])
def test_clusters_have_together_no_more_directions_than_a_block(
    core: str, size: dict[str, Any], tmp_path: Path
) -> None:
    folders = [lora(tmp_path / f"task-{n}", n, r=16) and tmp_path / f"task-{n}" for n in range(4)]
    report = lotr.compress(folders, tmp_path / "bank", bert(), core=core, clusters=2, **size)
    assert max(max(group["ranks"]) for group in report.groups) == 16


def test_an_adapter_that_is_zero_makes_no_cluster(tmp_path: Path) -> None:
    folders = three_kinds(tmp_path, each=2)
    lora(tmp_path / "a-zero", 1)
    edit(tmp_path / "a-zero", lambda tensors: [t.zero_() for key, t in tensors.items() if "lora_B" in key])
    report = lotr.compress([*folders, tmp_path / "a-zero"], tmp_path / "bank", bert(), rank=3, clusters=3)
    assert report.error < 0.01


def test_a_stopped_fit_is_not_gone_on_with_by_one_with_other_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotr.compression.passes.SAVE_AFTER", -1)
    folders = three_kinds(tmp_path, noise=0.1)

    def stop(what: str, done: int, of: int) -> None:
        if what == "Cores":
            raise KeyboardInterrupt

    fresh = lotr.compress(folders, tmp_path / "fresh", bert(), rank=4, clusters="auto")
    with pytest.raises(Interrupted):
        lotr.compress(folders, tmp_path / "bank", bert(), rank=4, clusters=3, tick=stop)
    report = lotr.compress(folders, tmp_path / "bank", bert(), rank=4, clusters="auto")
    assert report.by_task == [pytest.approx(row) for row in fresh.by_task]


def test_words_that_are_no_number_of_clusters_are_refused(tmp_path: Path) -> None:
    folders = [lora(tmp_path / f"task-{n}", n) and tmp_path / f"task-{n}" for n in range(2)]
    for odd in ("many", 0, -1, "1.5"):
        with pytest.raises(lotr.ConfigError, match="clusters"):
            lotr.compress(folders, tmp_path / "bank", bert(), clusters=odd)
    assert not (tmp_path / "bank").exists()
