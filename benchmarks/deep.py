"""Held-out loss per token of a decoder of thirty layers after a short fine-tuning: LoTR beside PEFT's LoRA.

    python benchmarks/deep.py --plan benchmarks/deep.yaml --runs docs/data/deep.csv

The texts are the functions of Python's own library, `def name: \"""docstring\"""`, or its source, or reviews of books,
joined and cut into rows of equal length. AdamW; a rate that rises for some steps and then falls to zero; gradients
clipped to a norm of one; products in float32, or in bfloat16 (autocast), as the plan says. Rates are chosen on dev;
final runs, at rates that are fixed, are measured on the first `test_rows` rows of test, and runs that confirm, with
other seeds, on all its other rows. A run is a line of the file; one that is there is not run again, so it can be
stopped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

import peft
import torch
import yaml
from torch import Tensor, nn
from transformers import set_seed

import lotr
from decoder import batches, docstrings, load_bfloat16, loss_of, packed, texts, train
from lotr.training.base_model import load_model, load_tokenizer
from quality_runs import append, rates_text
from records import calm

HERE = Path(__file__).parent
WORK = Path("out/deep")  # for adapters whose factors other methods keep
MOST = 1600  # rows of a part
COLUMNS = (
    *("modules", "method", "numbers", "rates", "steps", "seed", "part"),
    *("dev", "test", "seconds", "precision"),
)
Plan = dict[str, Any]


class Key(NamedTuple):
    """What tells a run from others; `part` is `rates`, `final` or `confirm`."""

    modules: str
    method: str
    rates: str
    steps: int
    seed: int
    part: str


def wanted(plan: Plan) -> Iterator[tuple[Key, dict[str, float]]]:
    """Yield the runs of a plan with their rates, seed by seed."""
    for part in ("rates", "final", "confirm"):
        for entry in plan.get(part) or ():
            for seed, name in itertools.product(entry["seeds"], entry["methods"]):
                method = plan["methods"][name]
                modules = " ".join(method.get("modules", plan["modules"]))
                for rates in method["rates" if part == "rates" else "final"]:
                    steps = entry.get("steps", plan["steps"])
                    yield Key(modules, name, rates_text(rates), steps, seed, part), rates


def read(path: Path) -> dict[Key, dict[str, str]]:
    """Return the runs of a file."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {
            Key(
                **{name: int(row[name]) if name in ("steps", "seed") else row[name] for name in Key._fields}
            ): row
            for row in csv.DictReader(file)
        }


@functools.cache
def rows(model: str, length: int, text: str, data: Path | None) -> dict[str, Tensor]:
    """Return the tokens of train, dev and test, `(rows, length)` each; no text is in two of them."""
    if text == "docstrings":
        draw = random.Random(0)
        train, test = (draw.sample(of, len(of)) for of in (docstrings("train"), docstrings("test")))
        fifth = len(train) // 5
        parts = {"train": train[fifth:], "dev": train[:fifth], "test": test}
    else:
        own = texts(text, data)
        parts = {
            "train": [text for at, text in enumerate(own) if at % 5 > 1],
            "dev": own[::5],
            "test": own[1::5],
        }
    tokenizer = load_tokenizer(model)
    return {part: packed(tokenizer, own, length, MOST) for part, own in parts.items()}


def adapted(plan: Plan, key: Key, train: Tensor) -> nn.Module:
    """Return the base model with a fresh adapter that has started as the method says."""
    bfloat16, method = plan["precision"] == "bfloat16", plan["methods"][key.method]
    base = load_bfloat16(plan["model"]) if bfloat16 else load_model(plan["model"], "causal-lm")
    set_seed(key.seed)
    if method["fields"] is None:  # the whole model
        return base
    fields = {"task_type": "CAUSAL_LM", "target_modules": key.modules.split(), **method["fields"]}
    if "peft" in method:
        return peft.get_peft_model(base, getattr(peft, method["peft"])(**fields))
    if "basis" in method:
        fields["basis"] = str(folder_of(plan, method["basis"]))
    model = peft.get_peft_model(base, lotr.LotrConfig(seed=key.seed, **fields))
    if model.peft_config["default"].init in ("gradient", "first_step") and "basis" not in method:
        stream = batches(train, plan["batch_size"], key.seed)
        lotr.init_from_data(model, list(itertools.islice(stream, plan["gradient_batches"])), seed=key.seed)
    return model


def groups(model: nn.Module, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return the trained parameters with their rates; `b_lr` is the rate of LoRA's B, as in LoRA+, or of LoTR's U."""
    rates = {name: rate for name, rate in rates.items() if name not in ("beta2", "clip", "muon", "warmup")}
    if "b_lr" not in rates:
        return lotr.parameter_groups(model, **rates)
    marks = {".lora_B.": "b_lr", ".lotr_U.": "b_lr", ".lotr_C.": "core_lr"}
    return [
        {
            "params": [parameter],
            "lr": rates[next((name for mark, name in marks.items() if mark in path), "lr")],
        }
        for path, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def trained(plan: Plan, key: Key, rates: dict[str, float], tokens: Tensor) -> nn.Module:
    """Return the base model with an adapter that was trained."""
    model = adapted(plan, key, tokens)
    stream = batches(tokens, plan["batch_size"], key.seed)
    warmup = int(rates.get("warmup", plan["warmup"]))
    train(model, optimizer(groups(model, rates), rates), stream, key.steps, warmup)
    return model


def optimizer(groups: list[dict[str, Any]], rates: dict[str, float]) -> torch.optim.Optimizer:
    """Return AdamW with `beta2`, whose updates are clipped where `clip` is given, or Muon, whose momentum `muon` is."""
    if "muon" in rates:
        return torch.optim.Muon(groups, momentum=rates["muon"], weight_decay=0.0)
    adam = torch.optim.AdamW(groups, betas=(0.9, rates.get("beta2", 0.999)), weight_decay=0.0)
    if "clip" in rates:
        lotr.clip_updates(adam)
    return adam


def measure(plan: Plan, key: Key, rates: dict[str, float], data: Path | None) -> dict[str, Any]:
    """Return a run as a line of the file."""
    started = time.perf_counter()
    tokens = rows(plan["model"], plan["length"], text_of(plan, key.method), data)
    model = trained(plan, key, rates, tokens["train"])
    dev = loss_of(model, tokens["dev"][: plan["dev_rows"]])
    looked_at = {
        "rates": slice(0),
        "final": slice(plan["test_rows"]),
        "confirm": slice(plan["test_rows"], None),
    }
    test = tokens["test"][looked_at[key.part]]
    return {
        **key._asdict(),
        "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dev": round(dev, 5),
        "test": round(loss_of(model, test), 5) if len(test) else "",
        "seconds": round(time.perf_counter() - started),
        "precision": plan["precision"],
    }


def make_bases(plan: Plan, missing: list[tuple[Key, dict[str, float]]], data: Path | None) -> None:
    """Train the adapters whose factors runs keep, where they are not there."""
    for name in {plan["methods"][key.method].get("basis") for key, _ in missing} - {None}:
        if not (folder_of(plan, name) / "adapter_config.json").is_file():
            method = plan["methods"][name]
            (rates,) = method["final"]
            key = Key(" ".join(plan["modules"]), name, rates_text(rates), plan["steps"], 0, "final")
            tokens = rows(plan["model"], plan["length"], text_of(plan, name), data)
            trained(plan, key, rates, tokens["train"]).save_pretrained(folder_of(plan, name))


def folder_of(plan: Plan, basis: str) -> Path:
    """Return where an adapter is kept whose factors other methods take."""
    (rates,) = plan["methods"][basis]["final"]
    return WORK / f"{basis} {rates_text(rates)} {plan['steps']} steps"


def text_of(plan: Plan, method: str) -> str:
    """Return which text a method learns."""
    text: str = plan["methods"][method].get("text", plan["text"])
    return text


def main() -> None:
    """Do what is missing of the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the sets of reviews")
    parser.add_argument("--plan", type=Path, default=HERE / "deep.yaml")
    parser.add_argument("--runs", type=Path, default=Path("docs/data/deep.csv"))
    parser.add_argument("--precision", choices=("bfloat16", "float32"), help="of products; else the plan's")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each on one thread or OMP_NUM_THREADS"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    options = parser.parse_args()
    plan = yaml.safe_load(options.plan.read_text())
    plan["precision"] = options.precision or plan["precision"]
    calm()
    until = time.monotonic() + 60 * options.minutes
    done = read(options.runs)
    missing = [run for run in dict(wanted(plan)).items() if run[0] not in done]
    if options.data is None:
        here = [run for run in missing if text_of(plan, run[0].method) in ("docstrings", "source")]
        if len(here) < len(missing):
            print(f"{len(missing) - len(here)} runs on reviews are left out. Name their folder with --data.")
        missing = here
    make_bases(plan, missing, options.data)
    with ProcessPoolExecutor(options.jobs) as pool:
        doing = set()
        while doing or missing:
            while missing and len(doing) < options.jobs and time.monotonic() < until:
                doing.add(pool.submit(measure, plan, *missing.pop(0), options.data))
            if not doing:
                break
            done = next(as_completed(doing))
            doing.remove(done)
            append(options.runs, done.result(), COLUMNS)
            print(f"{len(missing)} left: {done.result()}", flush=True)


if __name__ == "__main__":
    main()
