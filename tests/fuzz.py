"""Mutated files before every reader. `python tests/fuzz.py 20000 [seed]` prints a table of what became of them."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

import banks
from loras import lora
from lotr import CoreBank, LotrError
from lotr.bank.basis import TASKS
from lotr.files.adapter_folder import BANK, BASIS_WEIGHTS, CONFIG, TASK, WEIGHTS, read_adapter, write_task
from lotr.files.peft_lora import read_lora
from lotr.training.data import TaskRecord
from lotr.training.data.files import read_table
from lotr.training.settings import TrainSettings, read_options
from lotr.training.tasks.task_list import read_tasks
from lotr.tuner.saved_adapter import read_saved

SECONDS = 10
#: What a field of JSON or YAML is replaced by.
VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"))
VALUES += ("", "x", "\0", "2020-13-45", "../..", "9" * 5000)
VALUES += ([], {}, [[]], [None], {"a": None}, {"": [1]}, ["q", 1], [1, 2, 3], {"shape": [1]})


class Hang(BaseException):
    """A reader took longer than `SECONDS`."""


def plain(value: Any) -> Any:
    """Return a value that can be compared: tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else repr(value)


def adapter(folder: Path) -> Any:
    saved = read_saved(folder)
    config = {key: value for key, value in saved.config.to_dict().items() if key != "checksum"}
    return [config, saved.tensors()]


def trained(folder: Path) -> Any:
    return [*adapter(folder), asdict(TaskRecord.from_dict(read_adapter(folder).task))]


def peft_lora(folder: Path) -> Any:
    opened = read_lora(folder)
    with opened.reader() as read:
        return [[read(module) for module in opened.keys], opened.head()]


def bank(folder: Path) -> Any:
    with CoreBank.open(folder) as opened:
        report = opened.verify()
        opened.overview(limit=3), opened.stats()
        if not report["ok"]:
            raise LotrError(str(report)[:200])
        return [
            opened.basis.config.to_dict() | {"basis": None},
            [vars(opened.get(name)) for name in opened.names()],
        ]


def settings(path: Path) -> Any:
    return asdict(TrainSettings(**read_options({}, path)))


ENDS = ("csv", "tsv", "json", "jsonl", "parquet", "txt")
#: Kind → its reader, and the files that are changed; those with a checksum come back equal or not at all.
KINDS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "adapter with task.json": (trained, (CONFIG, WEIGHTS, TASK)),
    "adapter of PEFT alone": (adapter, (CONFIG, WEIGHTS)),
    "LoRA of PEFT": (peft_lora, (CONFIG, WEIGHTS)),
    "bank": (bank, (BANK, CONFIG, BASIS_WEIGHTS, TASKS)),
    **{f"data {end}": (read_table, (f"rows.{end}",)) for end in ENDS},
    "settings": (settings, ("settings.yaml", "settings.json")),
    "list of tasks": (read_tasks, ("tasks.yaml",)),
}
SEALED = {"adapter with task.json": KINDS["adapter with task.json"][1], "bank": KINDS["bank"][1]}
SEALED |= {"adapter of PEFT alone": (CONFIG,)}


def make(folder: Path) -> dict[str, Path]:
    """Write one whole input of each kind; return where."""
    places = {name: folder / name.replace(" ", "-") for name in KINDS}
    torch.manual_seed(0)
    for name in ("adapter with task.json", "adapter of PEFT alone"):
        banks.basis(places[name], r=2)
    columns = {"text": "text", "text2": "text2", "label": "label"}
    task: dict[str, Any] = {"task": "classification", "labels": ["a", "b", "c"], "columns": columns}
    write_task(places["adapter with task.json"], task | {"max_length": 64, "base_model": "pico"})
    lora(places["LoRA of PEFT"], 0)
    banks.bank(folder, tasks=5, r=2).close()
    rows = [{"text": f"a text, number {n}", "label": "ab"[n % 2], "n": n / 3} for n in range(9)]
    table = pd.DataFrame(rows)
    for name in places:
        places[name].mkdir(exist_ok=True)
    for end in ENDS:
        path = places[f"data {end}"] / f"rows.{end}"
        if end in ("csv", "tsv"):
            table.to_csv(path, sep={"csv": ",", "tsv": "\t"}[end], index=False)
        elif end == "parquet":
            table.to_parquet(path)
        else:
            lines = [json.dumps(row) if end == "jsonl" else row["text"] for row in rows]
            path.write_text(json.dumps(rows) if end == "json" else "\n".join(map(str, lines)) + "\n")
    known = {"model": "bert", "train": "a.csv", "output": "o", "rank": "4", "lr": 1e-3}
    known = TrainSettings(**known, core_ranks="layer=2").to_dict()
    (places["settings"] / "settings.yaml").write_text(yaml.safe_dump(known))
    (places["settings"] / "settings.json").write_text(json.dumps(known))
    (places["list of tasks"] / "tasks.yaml").write_text("a: a.csv\nb: {train: b.csv, label: topic}\n")
    return places


def mutated(content: bytes, name: str, draw: random.Random) -> bytes:
    """Return other bytes: some changed, cut, doubled or inserted; or a field of JSON or YAML with another value."""
    if name.endswith((".json", ".yaml")) and draw.random() < 0.5:
        whole = yaml.safe_load(content)
        inner: Any = whole
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = draw.choice(keys)
            if not isinstance(inner[key], dict | list) or not inner[key] or draw.random() < 0.3:
                break
            inner = inner[key]
        if isinstance(inner, dict) and draw.random() < 0.2:
            del inner[key]
        else:
            inner[key] = draw.choice(VALUES)
        if isinstance(whole, dict):
            whole.pop("checksum", None)  # the values alone have to be refused
        text = yaml.safe_dump(whole) if name.endswith("yaml") else json.dumps(whole)
        levels = 500 if name.startswith(("settings", "tasks")) else 3000  # YAML's parser is of Python
        deep = "[" * levels + "]" * levels
        return text.replace(
            "null", draw.choice(("null", deep, "2020-01-01", "!!python/object:x.y {}")), 1
        ).encode()
    at, length = draw.randrange(len(content)), draw.choice((1, 1, 2, 8, 64))
    junk = bytes(draw.randrange(256) for _ in range(length))
    return draw.choice(
        (
            content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :],
            content[:at] + junk + content[at + length :],
            content[:at] + junk + content[at:],
            content[:at] + content[at + length :],
            content[:at],
            content[:at] + content[at : at + length] * 3 + content[at + length :],
            content[:at] + bytes(length) + content[at + length :],
        )
    )


def run(times: int, seed: int = 0) -> tuple[dict[str, Counter[str]], list[str]]:
    """Read mutated inputs; return outcomes by kind, and what is wrong: the first line of each failure."""

    def alarm(*_: object) -> None:
        raise Hang

    draw, wrong = random.Random(seed), list[str]()
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in KINDS}
    before = signal.signal(signal.SIGPROF, alarm)  # of the processor's time: others may keep it busy
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        places = make(Path(temporary))
        outside = sorted(Path(temporary).iterdir())
        target = Path(temporary) / "mutated"

        def path_of(kind: str, file: str) -> Path:
            return target if KINDS[kind][1][0] in (CONFIG, BANK) else target / file

        def copy(kind: str) -> None:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(places[kind], target)

        right = {}
        for kind, (read, files) in KINDS.items():
            for file in files:
                copy(kind)
                right[kind, file] = plain(read(path_of(kind, file)))
        for n in range(times):
            kind = list(KINDS)[n % len(KINDS)]
            read, files = KINDS[kind]
            file = draw.choice(files)
            copy(kind)
            content = (target / file).read_bytes()
            other = mutated(content, file, draw)
            (target / file).write_bytes(other)
            sealed = file in SEALED.get(kind, ()) and (not file.endswith("json") or b"checksum" in other)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                same = plain(read(path_of(kind, file))) == right[kind, file]
                outcome = "equal" if same else "other values, as it says" if not sealed else "WRONG"
            except LotrError as error:
                outcome = "refused" if str(error) else "WITHOUT A WORD"
            except Hang:
                outcome = "HANG"
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                outcome = "TRACEBACK"
                wrong.append(
                    f"{kind}, {file}: {type(error).__name__}: {str(error)[:100]} ({at.name}:{at.lineno})"
                )
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if outcome in ("WRONG", "HANG"):
                wrong.append(f"{kind}, {file}: {outcome} (seed {seed}, number {n})")
            outcomes[kind][outcome] += 1
        if sorted(set(Path(temporary).iterdir()) - {target}) != outside:
            wrong.append("a file outside the input was written")
    signal.signal(signal.SIGPROF, before)
    return outcomes, wrong


def main() -> None:
    """Print the table."""
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, wrong = run(int(sys.argv[1]), seed)
    names = sorted({outcome for counts in outcomes.values() for outcome in counts})
    for kind, counts in {**outcomes, "all": sum(outcomes.values(), Counter())}.items():
        print(f"{kind:24}", *(f"{name}: {counts[name]:6}" for name in names), sep="  ")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) // 1024
    print(f"memory grew by {grown} MiB")
    for line, times in Counter(wrong).most_common(40):
        print(times, line)
    sys.exit(bool(wrong) or grown > 1024)


if __name__ == "__main__":
    main()
