"""`lotr compress` from a shell: the bank, the report, later adapters, and runs that are interrupted."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import banks
import lotr as library
from commands import lotr, refused, report
from conftest import bert, painted, tokens
from loras import dense, lora
from lotr import LotrConfig
from lotr.compression import passes as fit_passes
from saved_models import WORDS, save_bert


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and five LoRAs."""
    folder = tmp_path_factory.mktemp("saved")
    bert().save_pretrained(folder / "base")
    for n in range(5):
        lora(folder / f"task-{n}", n, base=folder / "base", task_type="SEQ_CLS")
    return folder


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


def test_the_shell_makes_a_bank_and_says_what_it_lost(place: Path) -> None:
    with painted():
        result = lotr("compress", f"{place}/task-*", "--output", place / "bank", "--rank", 4)
    assert result.exit_code == 0, result.stderr
    assert "5 tasks are in" in result.stdout
    assert "Half of this error takes" in result.stdout
    files = {path.name for path in (place / "bank").iterdir()}
    assert files >= {"bank.json", "tasks.sqlite", "basis.safetensors", "compress.json"}
    assert (place / "bank" / "compress.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((place / "bank" / "compress.json").read_text())
    assert report["bytes_after"] == sum(
        path.stat().st_size for path in (place / "bank").iterdir() if not path.name.startswith("compress.")
    )
    assert [row["error"] for row in report["by_task"]] == sorted(
        (row["error"] for row in report["by_task"]), reverse=True
    )
    errors = [point["error"] for point in report["curve"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    assert "both must be the same weights" not in result.stdout
    assert "The bank is no smaller than the adapters" in result.stdout
    (place / "base").rename(place / "moved")
    options = ("--max-bytes", "1mb", "--base", place / "moved")
    result = lotr("compress", f"{place}/task-*", "--output", place / "exact", *options)
    assert "both must be the same weights" in result.stdout
    assert (
        "Much of this error is rounding in bfloat16. Keep the numbers with --dtype float32" in result.stdout
    )
    result = lotr(
        "compress", f"{place}/task-*", "--output", place / "near", "--max-error", 0.0016, *options[2:]
    )
    assert "The error that was asked for, 0.0016, is not reached. Much of" in result.stdout.replace("\n", " ")


def test_a_lora_of_peft_is_inspected_as_its_dense_updates(place: Path) -> None:
    result = lotr("inspect", place / "task-0", "--json")
    inspection = json.loads(result.stdout)
    updates = dense(PeftModel.from_pretrained(bert(), str(place / "task-0")))
    assert {site["module"]: site["norm"] for site in inspection["sites"]} == pytest.approx(
        {path: float(dW.norm()) for path, dW in updates.items()}, rel=1e-4
    )
    assert inspection["numbers"] == 6 * 3 * 64
    assert inspection["head"] == 3 * 32 + 3
    assert (place / "task-0" / "cores.png").is_file()


@pytest.mark.parametrize("kind", [LoraConfig, library.LotrConfig])
def test_an_adapter_that_peft_saved_with_a_head_is_evaluated_and_merged(place: Path, kind: Any) -> None:
    """Its classes are numbers; what it says is what PEFT computes, of texts as long as the model takes them."""
    base = save_bert(place / f"bert-{kind.__name__}")
    config = kind(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(place / kind.__name__))
    longest = model.config.max_position_embeddings
    texts = ["red thing", "blue thing", "very old thing", "red blue old thing very " * longest]
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(texts)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    expected = model(**batch).logits.softmax(-1)
    out = place / f"{kind.__name__}.jsonl"
    lotr("predict", place / kind.__name__, "--data", place / "data.jsonl", "--output", out, "--json")
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["confidence"] for row in said] == pytest.approx(expected.amax(-1).tolist(), abs=1e-5)
    assert [row["prediction"] for row in said] == [str(int(n)) for n in expected.argmax(-1)]
    result = lotr("evaluate", place / kind.__name__, "--data", place / "data.jsonl", "--json")
    assert json.loads(result.stdout)["labels"] == ["0", "1"]
    lotr("merge", place / kind.__name__, "--output", place / f"{kind.__name__}-merged")
    merged = AutoModelForSequenceClassification.from_pretrained(place / f"{kind.__name__}-merged").eval()
    torch.testing.assert_close(merged(**batch).logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_no_output_replaces_the_base_model(place: Path) -> None:
    base = save_bert(place / "own")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base),
        LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS"),
    )
    model.save_pretrained(place / "own-lora")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base),
        LotrConfig(r=2, init_weights=False, task_type="SEQ_CLS"),
    )
    model.save_pretrained(place / "own-lotr")
    report("compress", place / "own-lora", "--output", place / "own-bank", "--rank", 2)
    before = {path.name: path.read_bytes() for path in Path(base).iterdir()}
    over = ("--output", base, "--overwrite")
    for line in (
        ("compress", place / "own-lora", "--rank", "2"),
        ("compress", place / "own-lotr", "--rank", "1"),
        ("bank", "export", place / "own-bank", "own-lora"),
        ("bank", "export", place / "own-bank", "own-lora", "--lora"),
    ):
        assert "is where the base model" in refused(2, *line, *over)
    assert {path.name: path.read_bytes() for path in Path(base).iterdir()} == before
    banks.stirred(LotrConfig(basis=str(place / "own-lotr"))).save_pretrained(place / "on-it")
    for more in ((), (place / "own-lora",)):
        words = ("compress", place / "on-it", *more, "--rank", "1", "--output", place / "own-lotr")
        assert "is where the basis" in refused(2, *words, "--overwrite")


def test_later_adapters_are_added_all_or_none(place: Path) -> None:
    lotr("compress", place / "task-0", place / "task-1", "--output", place / "bank")
    result = lotr("compress", place / "bank", "--add", place / "task-2", place / "task-3", "--json")
    assert json.loads(result.stdout)["tasks"] == 4
    message = refused(2, "compress", place / "bank", "--add", place / "task-4", place / "task-3")
    assert "has a task 'task-3' already" in message
    assert len(library.CoreBank.open(place / "bank")) == 4
    again = lotr(
        "compress", place / "bank", "--add", place / "task-4", place / "task-3", "--replace", "--json"
    )
    assert json.loads(again.stdout)["tasks"] == 5


def test_adapters_of_another_base_or_of_other_modules_are_told_so_and_not_that_the_base_is_wrong(
    place: Path,
) -> None:
    lotr("compress", place / "task-0", place / "task-1", "--output", place / "bank")
    lora(place / "other", base="other/model", task_type="SEQ_CLS")
    lora(place / "more", base=place / "base", task_type="SEQ_CLS", target_modules=["query", "key"])
    for words in ((place / "bank", "--add"), (place / "task-0", "--output", place / "new")):
        message = refused(1, "compress", *words, place / "other")
        assert "was trained on" in message and "'other/model'" in message and "compress them apart" in message
    message = refused(1, "compress", place / "bank", "--add", place / "more")
    assert "attention.self.key', for which the bank has no factors" in message
    assert "--add ADAPTER" in refused(
        1, "compress", place / "bank", place / "task-2", "--output", place / "new"
    )
    assert not (place / "new").exists()


def test_one_adapter_of_this_library_becomes_a_smaller_one(place: Path) -> None:
    config = LotrConfig(r=6, target_modules=["query", "value"], task_type="SEQ_CLS", init_weights=False)
    model = banks.stirred(config)
    model.peft_config["default"].base_model_name_or_path = str(place / "base")
    model.save_pretrained(str(place / "own"), save_embedding_layers=False)
    result = lotr("compress", place / "own", "--output", place / "small", "--rank", 3, "--json")
    report = json.loads(result.stdout)
    assert [group["after"] for group in report["groups"]] == [[3, 3], [3, 3]]
    assert report["bytes_after"] < 0.7 * report["bytes_before"]
    library.truncate(model, rank=3)
    small = PeftModel.from_pretrained(bert(), str(place / "small")).eval()
    torch.testing.assert_close(small(input_ids=tokens()).logits, model.eval()(input_ids=tokens()).logits)
    lotr("compress", place / "own", "--output", place / "near", "--max-error", 0.2)
    kept = library.inspect(place / "near").sites
    assert 0.96 * sum(s.norm**2 for s in library.inspect(place / "own").sites) <= sum(s.norm**2 for s in kept)


def test_calls_without_meaning_are_refused_and_write_nothing(place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert "--output" in refused(2, "compress", place / "task-0", place / "task-1")
    assert "takes a bank" in refused(2, "compress", place / "task-0", "--add")
    assert "--rank means nothing with --add" in refused(
        2, "compress", place / "base", "--add", place / "task-0", "--rank", 4
    )
    assert "--modes means nothing with --add" in refused(  # whatever its value
        2, "compress", place / "base", "--add", place / "task-0", "--modes", "task"
    )
    assert "folder of adapters" in refused(2, "compress", place, "--output", place / "bank")
    assert "is not empty" in refused(2, "compress", place / "task-*", "--output", place / "base")
    message = refused(
        2, "compress", place / "task-*", "--output", place / "bank", "--modes", "task, nonsense"
    )
    assert "'nonsense' is none. Name some of: task, layer, projection, expert" in message
    message = refused(2, "compress", place / "task-*", "--output", place / "bank", "--evaluate", "no.yaml")
    assert "no.yaml cannot be read: No such file" in message
    assert "config.json" in refused(
        2, "compress", place / "task-*", "--output", place / "bank", "--base", place / "task-0"
    )
    assert sorted(path.name for path in place.iterdir()) == before


def test_an_interrupted_fit_goes_on_and_gives_the_same_bank(place: Path, monkeypatch: Any) -> None:
    """Stopped in every pass in turn; a request with other settings begins anew."""
    monkeypatch.setattr(fit_passes, "SAVE_AFTER", 0.0)
    places = [place / "task-*"]
    library.compress(places, place / "whole", place / "base", rank=3)
    passes: list[str] = []

    def stop_at(n: int) -> Any:
        def tick(what: str, done: int, of: int) -> None:
            passes.append(what)
            if len(passes) > n:
                raise KeyboardInterrupt

        return tick

    seen = []
    for n in range(40):
        passes.clear()
        try:
            library.compress(places, place / "bank", place / "base", rank=3, tick=stop_at(5 + n // 2))
            break
        except (library.LotrError, KeyboardInterrupt) as error:
            seen.append((passes[-1], type(error).__name__))
            assert not (place / "bank").exists()
            assert {file.suffix for file in (place / ".bank.fit").glob("*")} <= {".safetensors"}
    assert {what for what, _ in seen} >= {"Directions", "Cores"}
    assert seen[-1][1] == "Interrupted"
    assert not (place / ".bank.fit").exists()
    whole, bank = (library.CoreBank.open(place / name) for name in ("whole", "bank"))
    assert whole.description.basis_hash == bank.description.basis_hash
    assert torch.equal(whole.read(list(whole.names()))[0], bank.read(list(bank.names()))[0])


def test_a_killed_fit_leaves_nothing_at_the_output(place: Path) -> None:
    slow = (
        "import time, lotr\n"
        f"lotr.compress(['{place}/task-*'], '{place}/bank', '{place}/base', rank=3,"
        " tick=lambda what, done, of: what == 'Cores' and (print('now', flush=True), time.sleep(60)))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (place / "bank").exists()
    library.compress([f"{place}/task-*"], place / "bank", place / "base", rank=3)
    assert len(library.CoreBank.open(place / "bank")) == 5


def test_scores_before_are_those_of_the_adapters_and_scores_after_those_of_the_exported_tasks(
    tmp_path: Path,
) -> None:
    base = save_bert(tmp_path / "base")
    for n, (name, classes) in enumerate({"price": 1, "mail": 2, "idle": 2}.items()):
        make = partial(AutoModelForSequenceClassification.from_pretrained, base, num_labels=classes)
        lora(tmp_path / "loras" / name, n, make, base, task_type="SEQ_CLS", r=2, lora_alpha=20)
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=6)) for _ in range(40)]
    prices = [f"{text},{generator.random()}" for text in texts]
    (tmp_path / "prices.csv").write_text("\n".join(["text,label", *prices]))
    (tmp_path / "mail.csv").write_text(
        "\n".join(["words,class", *(f"{text},{n % 2}" for n, text in enumerate(texts))])
    )
    (tmp_path / "tasks.yaml").write_text(
        "price: prices.csv\nmail: {train: mail.csv, text: words, label: class}\n"
    )
    call = ("compress", tmp_path / "loras" / "*", "--rank", 1, "--output", tmp_path / "bank")
    result = lotr(*call, "--evaluate", tmp_path / "tasks.yaml", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    tasks = {row["task"]: row for row in report["by_task"]}
    assert "metric" not in tasks["idle"]
    columns = {
        "price": {"data": "prices.csv"},
        "mail": {"data": "mail.csv", "text": "words", "label": "class"},
    }
    for name, metric in (("price", "pearson"), ("mail", "accuracy")):
        with library.CoreBank.open(tmp_path / "bank") as bank:
            bank.export(name, tmp_path / "out" / name, as_lora=True)
        for when, folder in (("before", "loras"), ("after", "out")):
            options = {**columns[name], "data": str(tmp_path / columns[name]["data"])}
            measured = library.evaluate(tmp_path / folder / name, **options)
            assert tasks[name][f"score_{when}"] == pytest.approx(measured[metric], abs=1e-5)
    before, after = tasks["price"]["score_before"], tasks["price"]["score_after"]
    assert abs(before - after) > 1e-3
    assert f"Mean pearson of 1 tasks: {before:.4g} before, {after:.4g} after" in " ".join(report["advice"])
    (tmp_path / "tasks.yaml").write_text("prize: prices.csv\n")
    message = refused(2, *call[:-1], tmp_path / "other", "--evaluate", tmp_path / "tasks.yaml")
    assert "names 'prize', which is no adapter. Near matches: price" in message
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("modes", ["task", "task,layer"])
def test_the_plan_foretells_the_bytes_of_the_bank(modes: str, place: Path) -> None:
    result = lotr(
        "compress", f"{place}/task-*", "--output", place / "bank", "--rank", 3, "--modes", modes, "--json"
    )
    report = json.loads(result.stdout)
    options = ("--rank", 3, "--target-modules", "query,value", "--compress", 5, "--json")
    own = ("--modes", "layer") if "layer" in modes else ()
    planned = json.loads(lotr("plan", place / "base", *options, *own).stdout)
    assert planned["bank"]["bytes"] == report["bytes_of_numbers"] - report["bytes_of_heads"]
    assert planned["bank"]["bytes_of_loras_a_rank"] == 5 * 6 * 64 * 2


def test_a_cluster_without_ray_is_answered_with_what_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refused(2, "compress", f"{place}/task-*", "--output", place / "bank", "--ray", "local")
    assert "pip install 'lotr[ray]'" in message
    assert not (place / "bank").exists()


def _full(*args: object, **words: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _full_system(*args: object, **words: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "writer, fails",
    [
        ("passes.save_file", _full),
        ("tasks.save_tensors", _full),
        ("run.write_json", _full_system),
        ("run.draw", _full_system),
    ],
)
def test_a_disk_that_fills_up_while_a_bank_is_made_leaves_nothing(
    writer: str, fails: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_passes, "SAVE_AFTER", 0.0)
    before = sorted(place.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(f"lotr.compression.{writer}", fails)
        message = refused(1, "compress", f"{place}/task-*", "--output", place / "bank", "--rank", 3)
    assert "bank cannot be written: the disk is full. Nothing is left of it; make room" in message
    assert {path.name for path in place.iterdir()} - {path.name for path in before} <= {".bank.fit"}
    library.compress([f"{place}/task-*"], place / "bank", place / "base", rank=3)
    assert len(library.CoreBank.open(place / "bank")) == 5
