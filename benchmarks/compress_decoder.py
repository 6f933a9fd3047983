"""Six LoRAs trained with PEFT on a decoder of thirty layers, before and after they became one bank, at three sizes.

    python benchmarks/compress_decoder.py --data FOLDER --json out/compress_decoder.json

The texts are reviews of books, films and kitchen things, sentences on films, docstrings of Python's own library, and
its source, joined and cut into rows of 64 tokens. Query and value, rank 8, 100 steps of 8 rows. A score is the loss per
token on 64 rows that were not trained on. What is compared, and how sizes are counted, is as in `compress_loras.py`.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import set_seed

import lotr
from compress_loras import BANKS, cut_by_svd, merged_by_peft
from decoder import batches, load_bfloat16, loss_of, packed, texts
from decoder import train as train_steps
from lotr.training.base_model import load_tokenizer
from real_loras import RANK, Pairs, Results, Row, error_of, pairs_of
from records import calm, fill, markdown, write

MODEL, LENGTH, STEPS, BATCH, LR = "smollm2", 64, 100, 8, 3e-3
SETS = ("reviews_books", "reviews_dvd", "reviews_kitchen", "sst2")
TASKS = (*SETS, "docstrings", "source")
ROWS = {"train": STEPS * BATCH, "test": 64}
SHARES = (1 / 8, 1 / 4, 1 / 2)


def tokens(task: str, data: Path) -> dict[str, Tensor]:
    """Return rows of tokens of a task, `(rows, LENGTH)`; no text is in both parts."""
    tokenizer, stream = load_tokenizer(MODEL), iter(texts(task, data))
    parts = {part: packed(tokenizer, stream, LENGTH, n) for part, n in ROWS.items()}
    if any(len(parts[part]) < n for part, n in ROWS.items()):
        raise SystemExit(f"{task} has too few texts for {ROWS} rows of {LENGTH} tokens.")
    return parts


def base() -> nn.Module:
    """Return the decoder, whose products are bfloat16."""
    return load_bfloat16(MODEL)


def fresh() -> Any:
    """Return the decoder with a LoRA that has just begun."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path = MODEL
    return peft.get_peft_model(base(), config)


def train(folder: Path, rows: Tensor, seed: int) -> None:
    """Train a LoRA and save it."""
    set_seed(seed)
    model = fresh()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LR, weight_decay=0.0)
    train_steps(model, optimizer, batches(rows, BATCH, seed), STEPS, warmup=10)
    model.save_pretrained(folder)


class Decoder:
    """The six adapters.

    Args:
        work: Folder of everything.
        data: Folder with the sets of reviews and sentences.
    """

    def __init__(self, work: Path, data: Path) -> None:
        self.work, self.folders = work, {task: work / "loras" / task for task in TASKS}
        self.rows = {task: tokens(task, data) for task in TASKS}
        for seed, (task, folder) in enumerate(self.folders.items()):
            if not (folder / "adapter_config.json").is_file():
                print(f"training {task}", flush=True)
                train(folder, self.rows[task]["train"], seed)
        self.pairs = {task: pairs_of(folder) for task, folder in self.folders.items()}
        self.size = 2 * sum(A.numel() + B.numel() for own in self.pairs.values() for A, B in own.values())
        self.model = fresh()

    def losses(self, after: dict[str, Pairs]) -> dict[str, float]:
        """Return the loss of each task with its matrices."""
        losses = {}
        for task, pairs in after.items():
            for path, module in self.model.base_model.model.named_modules():
                if hasattr(module, "lora_A"):
                    none = torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1)
                    A, B = pairs.get(path, none)
                    module.lora_A["default"].weight = nn.Parameter(A.float())
                    module.lora_B["default"].weight = nn.Parameter(B.float())
            losses[task] = round(loss_of(self.model, self.rows[task]["test"]), 4)
        return losses

    def after(self, what: str, size: int) -> dict[str, Pairs]:
        """Return the updates of all tasks after they were cut to a size together."""
        if what == "own SVD":
            return {task: cut_by_svd(own, size // len(TASKS)) for task, own in self.pairs.items()}
        if what == "merged":
            modules = next(iter(self.pairs.values())).values()
            rank = max(1, size // sum(2 * (A.shape[1] + B.shape[0]) for A, B in modules))
            one = merged_by_peft(list(self.folders.values()), self.work / "plain", rank, base)
            return dict.fromkeys(TASKS, one)
        bank = self.work / f"{what}-{size}"
        lotr.compress(list(self.folders.values()), bank, MODEL, max_bytes=size, **BANKS[what], overwrite=True)
        back = self.work / "back"
        with lotr.CoreBank.open(bank) as opened:
            for task in TASKS:
                opened.export(task, back / task, as_lora=True, overwrite=True)
        return {task: pairs_of(back / task) for task in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with reviews_books, … and sst2")
    parser.add_argument("--work", type=Path, default=Path("out/compress_decoder"), help="a run goes on there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    given = parser.parse_args()
    calm()
    decoder, results = Decoder(given.work, given.data), Results(given.work / "results.jsonl")

    def measured(pairs: Any) -> Row:
        after = pairs()
        losses = decoder.losses(after)
        return {"error": round(error_of(decoder.pairs, after), 4), "losses": losses}

    nothing: dict[str, Pairs] = {task: {} for task in TASKS}
    results.get({"what": "the model"}, partial(measured, lambda: nothing))
    results.get({"what": "the LoRAs"}, partial(measured, lambda: decoder.pairs))
    for share, what in itertools.product(SHARES, ("own SVD", *BANKS, "merged")):
        after = partial(decoder.after, what, int(decoder.size * share))
        results.get({"what": what, "share": share}, partial(measured, after))
    lines = table(results.rows)
    print("\n".join(lines))
    if given.json:
        write(given.json, results.rows)
    if given.page:
        fill(given.page, "decoder", lines)


def table(rows: list[Row]) -> list[str]:
    """Return a table of the losses of all tasks, in Markdown."""
    of_loras = next(row["losses"] for row in rows if row["what"] == "the LoRAs")
    body = [
        [
            row["what"],
            f"1/{round(1 / row['share'])}" if "share" in row else "",
            f"{row['error']:.3f}",
            f"{sum(row['losses'].values()) / len(TASKS):.3f}",
            f"{max(row['losses'][task] - of_loras[task] for task in TASKS):+.3f}",
        ]
        for row in rows
    ]
    return markdown(["", "size", "error", "mean loss", "worst task, beside its LoRA"], body, left=2)


if __name__ == "__main__":
    main()
