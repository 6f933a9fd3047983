"""Twelve LoRAs trained with PEFT on MiniLM, before and after they became one bank, at three sizes.

    python benchmarks/compress_loras.py --data ../shared/data --json out/compress_loras.json

Each task's score is that of its adapter after it went through the bank and out again as plain LoRA, on the task's own
test rows. Beside the bank: each adapter cut by its own SVD to the bank's bytes, ranks chosen over its modules; and
PEFT's `add_weighted_adapter(combination_type="svd")`, one adapter for all tasks with the head of each. Bytes are those
of adapter numbers: factors in float32 and cores in bfloat16 for the bank, bfloat16 for LoRAs. Two of the tasks are left
out of a second fit and projected afterwards.
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
from torch import Tensor

import lotr
from lotr.compression.add import add
from lotr.files.peft_lora import read_lora
from lotr.training.base_model import load_model
from lotr.training.data.docstrings import load_docstrings
from records import calm, show, write

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import demo_bank

Row = dict[str, Any]
Pairs = dict[str, tuple[Tensor, Tensor]]  # module → A, B
RANK, RANKS, ROWS = 8, (4, 8, 16), {"train": 600, "test": 400}
HELD_OUT = 2
WEIGHTS = "adapter_model.safetensors"


def write_tasks(folder: Path, data: Path | None, n: int) -> dict[str, dict[str, str]]:
    """Write the rows of the tasks: reviews and sentences where they are at hand, then docstrings."""
    tasks: dict[str, demo_bank.Rows] = {}
    for name in ("reviews_books", "reviews_dvd", "reviews_kitchen", "sst2") if data else ():
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


def write_pairs(like: Path, folder: Path, pairs: Pairs) -> Path:
    """Write an adapter with other matrices, the head and the task of another one."""
    shutil.copytree(like, folder, dirs_exist_ok=True)
    lora = read_lora(like)
    config = json.loads((like / "adapter_config.json").read_text())
    ranks = {module: len(A) for module, (A, _) in pairs.items()}
    exact = {f"^{module.replace('.', chr(92) + '.')}": rank for module, rank in ranks.items()}
    config |= {
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": exact,
        "alpha_pattern": exact,
        "target_modules": sorted(ranks),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = dict(lora.head())
    for module, (A, B) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    record = json.loads((folder / "task.json").read_text())
    for known in ("weights_sha256", "base_fingerprint"):  # fewer modules have another fingerprint
        record.pop(known, None)
    (folder / "task.json").write_text(json.dumps(record))
    return folder


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


def score(folder: Path, data: str) -> float:
    return float(lotr.evaluate(folder, data)["accuracy"])


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, help="folder with reviews_books, … and sst2")
    options.add_argument("--tasks", type=int, default=12)
    options.add_argument("--work", type=Path, default=Path("out/compress_loras"))
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    calm()
    work: Path = given.work
    (work / "data").mkdir(parents=True, exist_ok=True)
    files = write_tasks(work / "data", given.data, given.tasks)
    folders: dict[str, Path] = {}
    for name, of_task in files.items():
        folders[name] = work / "loras" / name
        if not (folders[name] / WEIGHTS).is_file():
            lotr.train(
                model="minilm",
                train=of_task["train"],
                eval=of_task["test"],
                output=str(folders[name]),
                method="peft_lora",
                rank=str(RANK),
                epochs=4,
                lr=3e-3,
                max_length=64,
            )
    before = {name: score(folder, files[name]["test"]) for name, folder in folders.items()}
    pairs = {name: pairs_of(folder) for name, folder in folders.items()}
    rows = [
        _row(
            "LoRA, rank 8",
            sum(2 * (A.numel() + B.numel()) for own in pairs.values() for A, B in own.values()),
            0.0,
            before,
        )
    ]
    width = sum(next(iter(next(iter(pairs.values())).values()))[n].shape[1 - n] for n in (0, 1))
    for rank in RANKS:
        place = work / f"rank-{rank}"
        shutil.rmtree(place, ignore_errors=True)
        report = lotr.compress(list(folders.values()), place / "bank", "minilm", rank=rank)
        size = report.bytes_of_numbers - report.bytes_of_heads
        rows.append(_row(f"bank, rank {rank}", size, report.error, _through(place, files, folders)))
        units = size // len(folders) // (2 * width)
        cut = {name: cut_by_svd(own, units) for name, own in pairs.items()}
        rows.append(
            _row(
                "own SVD, same bytes",
                2 * width * units * len(folders),
                _error(pairs, cut),
                _scores(cut, folders, place / "svd", files),
            )
        )
        merged = merged_by_peft(
            list(folders.values()), place / "plain", max(1, size // (2 * width * len(pairs[name])))
        )
        rows.append(
            _row(
                "add_weighted_adapter(svd)",
                size,
                _error(pairs, dict.fromkeys(pairs, merged)),
                _scores(dict.fromkeys(pairs, merged), folders, place / "merged", files),
            )
        )
        held = list(folders)[-HELD_OUT:]
        rest = [folder for other, folder in folders.items() if other not in held]
        lotr.compress(rest, place / "others", "minilm", rank=rank)
        errors = add(place / "others", [folders[other] for other in held])["added"]
        rows.append(
            _row(
                f"held out: {', '.join(held)}",
                0,
                max(errors.values()),
                _through(place, {k: files[k] for k in held}, folders, "others"),
            )
        )
    show(
        "Twelve LoRAs on MiniLM",
        list(rows[0])[:4],
        [[str(v) for v in list(row.values())[:4]] for row in rows],
    )
    if given.json:
        write(given.json, rows)


def _row(what: str, size: int, error: float, scores: dict[str, float]) -> Row:
    mean = sum(scores.values()) / len(scores)
    return {"what": what, "bytes": size, "error": round(error, 4), "score": round(mean, 4), "scores": scores}


def _through(
    place: Path, files: dict[str, Any], folders: dict[str, Path], bank: str = "bank"
) -> dict[str, float]:
    scores = {}
    with lotr.CoreBank.open(place / bank) as opened:
        for name in files:
            opened.export(name, place / f"{bank}-{name}", as_lora=True)
            scores[name] = score(place / f"{bank}-{name}", files[name]["test"])
    return scores


def _scores(
    pairs: dict[str, Pairs], folders: dict[str, Path], place: Path, files: dict[str, Any]
) -> dict[str, float]:
    return {
        name: score(write_pairs(folders[name], place / name, own), files[name]["test"])
        for name, own in pairs.items()
    }


def _error(before: dict[str, Pairs], after: dict[str, Pairs]) -> float:
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
