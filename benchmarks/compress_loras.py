"""Twelve LoRAs trained with PEFT on MiniLM, before and after they became one bank, at four sizes.

    python benchmarks/compress_loras.py --data ../shared/data --json out/compress_loras.json

Each task is measured on its own test rows. *bank*: its task in the bank. *own SVD*: each adapter cut by its own SVD to
the bank's bytes, ranks chosen over its modules. *merged*: PEFT's `add_weighted_adapter(combination_type="svd")` at the
bank's bytes, one adapter for all tasks with the head of each. *held out*: every fourth adapter, left out of a second
fit and projected afterwards. Bytes are those of updates: factors in float32 and cores in bfloat16 for the bank,
bfloat16 for LoRAs. Without --data the sets of reviews and sentences are left out, and docstrings alone remain.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lotr
from lotr.compression.add import add
from lotr.compression.scores import Before, measure_adapters, measure_bank
from lotr.files.peft_lora import read_lora
from lotr.training.base_model import load_model
from lotr.training.data.docstrings import load_docstrings
from lotr.training.trained import Trained, load_trained
from records import calm, show, write

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import demo_bank

Row = dict[str, Any]
Pairs = dict[str, tuple[Tensor, Tensor]]  # module → A, B
RANK, ROWS = 8, {"train": 240, "test": 200}
SETS = ("reviews_books", "reviews_dvd", "reviews_kitchen", "sst2")
WEIGHTS = "adapter_model.safetensors"


def write_tasks(folder: Path, data: Path | None, n: int) -> dict[str, dict[str, str]]:
    """Write the rows of the tasks: reviews and sentences where they are at hand, then docstrings."""
    tasks: dict[str, demo_bank.Rows] = {}
    for name in SETS if data else ():
        tasks[name] = {split: _rows(data / name, split) for split in ("train", "test")}
    tasks |= {name.replace(" ", "_"): rows for name, rows in demo_bank.tasks_of(load_docstrings()).items()}
    files = {}
    for name, rows in list(tasks.items())[:n]:
        files[name] = {split: str(folder / f"{name}-{split}.csv") for split in ("train", "test")}
        for split, path in files[name].items():
            with Path(path).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["text", "label"])
                writer.writeheader()
                writer.writerows(rows[split])
    return files


def _rows(folder: Path, split: str) -> list[dict[str, str]]:
    names = [
        path
        for path in sorted(folder.iterdir())
        if split in path.name or (split == "test" and "dev" in path.name)
    ]
    with names[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if names[0].suffix == ".tsv" else ","))
    text = "text" if "text" in rows[0] else "sentence"
    random.Random(0).shuffle(rows)
    return [{"text": row[text], "label": row["label"]} for row in rows[: ROWS[split]]]


def pairs_of(folder: Path) -> Pairs:
    lora = read_lora(folder)
    return {module: lora.matrices(module) for module in lora.keys}


def cut_by_svd(pairs: Pairs, units: int) -> Pairs:
    """Keep the largest singular directions of all modules, as many as there are bytes for."""
    parts = {m: torch.linalg.svd(B @ A, full_matrices=False) for m, (A, B) in pairs.items()}
    order = sorted(((float(s), m) for m, (_, S, _) in parts.items() for s in S[:RANK]), reverse=True)[:units]
    kept = {m: sum(module == m for _, module in order) for m in pairs}
    return {m: (Vh[: kept[m]], U[:, : kept[m]] * S[: kept[m]]) for m, (U, S, Vh) in parts.items() if kept[m]}


def merged_by_peft(folders: list[Path], place: Path, rank: int) -> Pairs:
    model: Any = None
    names = [f"t{n}" for n in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        plain = place / name
        plain.mkdir(parents=True)
        config = json.loads((folder / "adapter_config.json").read_text()) | {
            "modules_to_save": None,
            "task_type": None,
        }
        (plain / "adapter_config.json").write_text(json.dumps(config))
        tensors = {key: t for key, t in load_file(folder / WEIGHTS).items() if ".lora_" in key}
        save_file(tensors, plain / WEIGHTS, metadata={"format": "pt"})
        if model is None:
            model = PeftModel.from_pretrained(
                load_model("minilm", "classification", ("0", "1")), str(plain), name
            )
        else:
            model.load_adapter(str(plain), name)
    model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type="svd", svd_rank=rank)
    return {
        path: (
            module.lora_A["all"].weight.detach(),
            module.lora_B["all"].weight.detach() * module.scaling["all"],
        )
        for path, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


def score_with(trained: Trained, pairs: Pairs, data: str) -> float:
    """Return the accuracy of an adapter with other matrices and the head that it has."""
    for path, module in trained.model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = pairs.get(path, (torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1)))
            module.lora_A["default"].weight = nn.Parameter(A)
            module.lora_B["default"].weight = nn.Parameter(B / module.scaling["default"])
    return float(lotr.evaluate(trained, data)["accuracy"])


def train(files: dict[str, dict[str, str]], place: Path) -> dict[str, Path]:
    """Train a LoRA with PEFT for every task that has none yet."""
    folders = {name: place / name for name in files}
    for name, folder in folders.items():
        if not (folder / WEIGHTS).is_file():
            rows = {"train": files[name]["train"], "eval": files[name]["test"], "max_length": 48}
            epochs = 3 if name in SETS else 6  # docstrings have 80 rows
            lotr.train(
                model="minilm",
                output=str(folder),
                method="peft_lora",
                rank=str(RANK),
                epochs=epochs,
                lr=3e-3,
                **rows,
            )
    return folders


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, help="folder with reviews_books, … and sst2")
    options.add_argument("--tasks", type=int, default=12)
    options.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    options.add_argument("--work", type=Path, default=Path("out/compress_loras"))
    options.add_argument("--json", type=Path)
    options.add_argument("--picture", type=Path)
    given = options.parse_args()
    calm()
    work: Path = given.work
    (work / "data").mkdir(parents=True, exist_ok=True)
    files = write_tasks(work / "data", given.data, given.tasks)
    folders = train(files, work / "loras")
    tests = {name: str(Path(of_task["test"]).resolve()) for name, of_task in files.items()}
    (work / "tasks.yaml").write_text(json.dumps(tests))
    begun = measure_adapters(work / "tasks.yaml", folders, None, tick)
    before = {of.source.name: of.score for of in begun}
    pairs = {name: pairs_of(folder) for name, folder in folders.items()}
    loaded = {name: load_trained(folder) for name, folder in folders.items()}

    def scores(after: dict[str, Pairs]) -> dict[str, float]:
        return {name: score_with(loaded[name], after[name], tests[name]) for name in after}

    numbers = sum(A.numel() + B.numel() for own in pairs.values() for A, B in own.values())
    held = [name for n, name in enumerate(folders) if n % 4 == 2]
    rest = [folder for name, folder in folders.items() if name not in held]
    rows = [
        row("the LoRAs", 0, 2 * numbers, 0.0, before, held),
        row("their heads alone", 0, 0, 1.0, scores({name: {} for name in pairs}), held),
    ]
    width = sum(next(iter(next(iter(pairs.values())).values()))[n].shape[1 - n] for n in (0, 1))
    modules = len(next(iter(pairs.values())))
    for rank in given.ranks:
        place = work / f"rank-{rank}"
        shutil.rmtree(place, ignore_errors=True)
        report = lotr.compress(list(folders.values()), place / "bank", "minilm", rank=rank)
        size = report.bytes_of_numbers - report.bytes_of_heads
        rows.append(row("bank", rank, size, report.error, after_of(begun, place / "bank"), held))
        units = size // len(folders) // (2 * width)
        cut = {name: cut_by_svd(own, units) for name, own in pairs.items()}
        size_of_cut = 2 * width * units * len(folders)
        rows.append(row("own SVD", rank, size_of_cut, error_of(pairs, cut), scores(cut), held))
        merged = merged_by_peft(
            list(folders.values()), place / "plain", max(1, size // (2 * width * modules))
        )
        all_merged = dict.fromkeys(pairs, merged)
        rows.append(row("merged", rank, size, error_of(pairs, all_merged), scores(all_merged), held))
        lotr.compress(rest, place / "others", "minilm", rank=rank)
        errors = add(place / "others", [folders[name] for name in held])["added"]
        error = (sum(error**2 for error in errors.values()) / len(held)) ** 0.5
        of_held = [of for of in begun if of.source.name in held]
        rows.append(row("held out", rank, size, error, after_of(of_held, place / "others"), held))
    header = ["what", "rank", "bytes", "error", "score", "score_held"]
    show(f"{len(folders)} LoRAs on MiniLM", header, [[str(r[key]) for key in header] for r in rows])
    if given.json:
        write(given.json, rows)
    if given.picture:
        draw(rows, given.picture)


def tick(what: str, done: int, of: int) -> None:
    """Show no progress."""


def after_of(before: list[Before], bank: Path) -> dict[str, float]:
    return {name: of["score_after"] for name, of in measure_bank(before, bank, None, tick).items()}


def row(what: str, rank: int, size: int, error: float, scores: dict[str, float], held: list[str]) -> Row:
    means = [sum(scores[name] for name in names) / len(names) for names in (scores, held)]
    return {
        "what": what,
        "rank": rank,
        "bytes": size,
        "error": round(error, 4),
        "score": round(means[0], 4),
        "score_held": round(means[1], 4),
        "scores": scores,
    }


def draw(rows: list[Row], path: Path) -> None:
    """Draw mean accuracy against bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axis = figure.subplots()
    for what, color in (("bank", "#d9822b"), ("own SVD", "#3b6fb6"), ("merged", "#5d9b4b")):
        own = [row for row in rows if row["what"] == what]
        axis.plot([r["bytes"] for r in own], [r["score"] for r in own], "o-", color=color, label=what)
    for n, style in ((0, ":"), (1, "--")):
        axis.axhline(rows[n]["score"], color="#8a8f98", linestyle=style, label=rows[n]["what"])
    axis.set_xscale("log")
    axis.set_xlabel("bytes of all updates")
    axis.set_ylabel("mean accuracy")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def error_of(before: dict[str, Pairs], after: dict[str, Pairs]) -> float:
    """Return the root of the mean of the tasks' squared relative errors, as the bank has it."""
    squares = []
    for name, own in before.items():
        lost = energy = 0.0
        for module, (A, B) in own.items():
            dW = B @ A
            new = after[name].get(module)
            lost += float((dW - new[1] @ new[0] if new else dW).square().sum())
            energy += float(dW.square().sum())
        squares.append(lost / energy)
    return (sum(squares) / len(squares)) ** 0.5


if __name__ == "__main__":
    main()
