"""Held-out loss per token of a decoder of thirty layers after a short fine-tuning: LoTR beside PEFT's LoRA.

    python benchmarks/deep.py --plan benchmarks/deep.yaml --runs docs/data/deep.csv

The texts are the functions of Python's own library, `def name: \"""docstring\"""`, joined and cut into rows of equal
length. AdamW; a rate that rises for some steps and then falls to zero; gradients clipped to a norm of one; products in
float32, or in bfloat16 (autocast), as the plan says. A run is a line of the file; one that is there is not run again,
so it can be stopped.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import os
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is packaged

import peft
import torch
import yaml
from scipy.stats import t
from torch import Tensor, nn
from transformers import set_seed

import lotr
import pictures
from lotr.training.base_model import load_model, load_tokenizer
from lotr.training.data.docstrings import load_functions
from quality_runs import append, rates_text
from records import calm, fill, markdown

HERE = Path(__file__).parent
MARGIN = 0.01  # nats a token within which two methods count as equal, stated before the runs
COLUMNS = (
    *("modules", "method", "numbers", "rates", "steps", "seed", "part"),
    *("dev", "test", "seconds", "precision"),
)
Plan = dict[str, Any]


class Key(NamedTuple):
    """What tells a run from others; `part` is `rates` or `final`."""

    modules: str
    method: str
    rates: str
    steps: int
    seed: int
    part: str


def wanted(plan: Plan) -> Iterator[tuple[Key, dict[str, float]]]:
    """Yield the runs of a plan with their rates, seed by seed."""
    for part in ("rates", "final"):
        for entry in plan.get(part) or ():
            for seed, name in itertools.product(entry["seeds"], entry["methods"]):
                method = plan["methods"][name]
                modules = " ".join(method.get("modules", plan["modules"]))
                for rates in method.get(part, ()):
                    yield Key(modules, name, rates_text(rates), plan["steps"], seed, part), rates


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
def rows(model: str, length: int) -> dict[str, Tensor]:
    """Return the tokens of train, dev and test, `(rows, length)` each; a fifth of the training texts is dev."""
    tokenizer, splits = load_tokenizer(model), load_functions()
    draw = random.Random(0)
    train = draw.sample(splits["train"], len(splits["train"]))
    test = draw.sample(splits["test"], len(splits["test"]))
    fifth = len(train) // 5
    parts = {"train": train[fifth:], "dev": train[:fifth], "test": test}
    packed = {}
    for part, texts in parts.items():
        tokens: list[int] = []
        for text in texts:
            words = f'def {text["prompt"]}: """{text["completion"]}"""'
            tokens += [*tokenizer(words)["input_ids"], tokenizer.eos_token_id]
        packed[part] = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    return packed


def batches(tokens: Tensor, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches without end, in an order that depends on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(tokens), generator=draw)[: len(tokens) // size * size].split(size):
            yield {"input_ids": tokens[part], "labels": tokens[part]}


def loss_of(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean loss per token."""
    model.eval()
    with torch.inference_mode():
        losses = [float(model(input_ids=some, labels=some).loss) * len(some) for some in tokens.split(8)]
    return sum(losses) / len(tokens)


def adapted(plan: Plan, key: Key) -> nn.Module:
    """Return the base model with a fresh adapter that has started as the method says."""
    base, method = load_model(plan["model"], "causal-lm"), plan["methods"][key.method]
    if plan["precision"] == "bfloat16":
        # around one forward pass: what autocast has cast it keeps until it ends, and the trained numbers change
        base.forward = torch.autocast("cpu", torch.bfloat16)(base.forward)
    set_seed(key.seed)
    fields = {"task_type": "CAUSAL_LM", "target_modules": key.modules.split(), **method["fields"]}
    if "peft" in method:
        return peft.get_peft_model(base, getattr(peft, method["peft"])(**fields))
    model = peft.get_peft_model(base, lotr.LotrConfig(seed=key.seed, **fields))
    if fields.get("init") == "gradient":
        stream = batches(rows(plan["model"], plan["length"])["train"], plan["batch_size"], key.seed)
        seen = list(itertools.islice(stream, plan["gradient_batches"]))
        lotr.init_from_data(model, seen, seed=key.seed)
    return model


def groups(model: nn.Module, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return the trained parameters with their rates; `b_lr` is the rate of LoRA's B, as in LoRA+."""
    rates = {name: rate for name, rate in rates.items() if name != "beta2"}
    if "b_lr" not in rates:
        return lotr.parameter_groups(model, **rates)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {"params": [p for name, p in trained.items() if (".lora_B." in name) == is_b], "lr": lr}
        for is_b, lr in ((False, rates["lr"]), (True, rates["b_lr"]))
    ]


def measure(plan: Plan, key: Key, rates: dict[str, float]) -> dict[str, Any]:
    """Return a run as a line of the file."""
    started, tokens = time.perf_counter(), rows(plan["model"], plan["length"])
    model = adapted(plan, key)
    betas = 0.9, rates.get("beta2", 0.999)
    optimizer = torch.optim.AdamW(groups(model, rates), betas=betas, weight_decay=0.0)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rise, steps = plan["warmup"], plan["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise))
    )
    model.train()
    for batch in itertools.islice(batches(tokens["train"], plan["batch_size"], key.seed), steps):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    dev = loss_of(model, tokens["dev"][: plan["dev_rows"]])
    test = round(loss_of(model, tokens["test"][: plan["test_rows"]]), 5) if key.part == "final" else ""
    seconds = round(time.perf_counter() - started)
    numbers = sum(p.numel() for p in trained)
    return {
        **key._asdict(),
        "numbers": numbers,
        "dev": round(dev, 5),
        "test": test,
        "seconds": seconds,
        "precision": plan["precision"],
    }


class Final(NamedTuple):
    """The runs of a method with its rates fixed."""

    modules: str
    numbers: int
    losses: list[float]

    @property
    def mean(self) -> float:
        """Mean loss over seeds."""
        return statistics.mean(self.losses)


def final_runs(plan: Plan, runs: dict[Key, dict[str, str]]) -> dict[str, Final]:
    """Return the final runs of a plan by method, the smallest first; a file may hold those of other rates too."""
    asked = {key for key, _ in wanted(plan)}
    final: dict[str, Final] = {}
    for key, run in sorted(runs.items(), key=lambda item: int(item[1]["numbers"])):
        if key.part == "final" and key in asked:
            own = final.setdefault(run["method"], Final(run["modules"], int(run["numbers"]), []))
            own.losses.append(float(run["test"]))
    return final


def spread_of(final: dict[str, Final]) -> tuple[float, int]:
    """Return the spread of a seed, taken as one for all methods, and its degrees of freedom."""
    freedom = sum(len(own.losses) - 1 for own in final.values())
    squares = sum((loss - own.mean) ** 2 for own in final.values() for loss in own.losses)
    return (squares / freedom) ** 0.5, freedom


def compared(plan: Plan, final: dict[str, Final]) -> list[str]:
    """Return a table of the differences between the methods that the plan names.

    The intervals hold 95 % for all of them together (Student's t, Bonferroni). *Equal* and *not worse* are said only
    where an interval lies within `MARGIN`.
    """
    pairs = [pair for pair in plan["compare"] if all(method in final for method in pair)]
    (spread, freedom), rows = spread_of(final), []
    at = float(t.ppf(1 - 0.025 / len(pairs), freedom))
    for method, other in pairs:
        own, others = final[method], final[other]
        half = at * spread * (1 / len(own.losses) + 1 / len(others.losses)) ** 0.5
        low, high = own.mean - others.mean - half, own.mean - others.mean + half
        says = "**better**" if high < 0 else "*worse*" if low > 0 else "level"
        if low > -MARGIN and high < MARGIN:
            says = "equal"
        elif high < MARGIN and says == "level":
            says = "not worse"
        difference = f"{own.mean - others.mean:+.4f} ({low:+.4f} to {high:+.4f})"
        sizes = f"{own.numbers:,} / {others.numbers:,}"
        losses = f"{own.mean:.4f} / {others.mean:.4f}"
        rows.append([method, other, sizes, losses, difference, says])
    seeds = [len(own.losses) for own in final.values()]
    header = ("", "against", "numbers", "loss, test", f"difference (95 % for all {len(pairs)})", "")
    return [
        *markdown(header, rows, left=2),
        "",
        f"One seed's spread is {spread:.4f} nats ({freedom} degrees of freedom, {min(seeds)} to {max(seeds)} seeds).",
    ]


def draw(final: dict[str, Final], path: Path) -> None:
    """Draw loss against trained numbers."""
    spread, _ = spread_of(final)
    panels: dict[str, list[pictures.Point]] = {}
    for method, own in final.items():
        error, whose = spread / len(own.losses) ** 0.5, "PEFT" if "lora" in method else "this library"
        label, family = method.removesuffix(" gradient"), method.partition(" r")[0]
        point = pictures.Point(label, family, own.numbers, own.mean, error, whose)
        panels.setdefault(own.modules.replace("_proj", "").replace(" ", ", "), []).append(point)
    pictures.scores(panels, "loss per token, test (lower is better)", path)


def main() -> None:
    """Do what is missing of the plan, or write the table of what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=HERE / "deep.yaml")
    parser.add_argument("--runs", type=Path, default=Path("docs/data/deep.csv"))
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, each on one thread or OMP_NUM_THREADS"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--page", type=Path, help="run nothing; write the table into this page")
    options = parser.parse_args()
    plan = yaml.safe_load(options.plan.read_text())
    if options.page:
        final = final_runs(plan, read(options.runs))
        fill(options.page, "deep", compared(plan, final))
        draw(final, options.page.parent / "images" / "deep.png")
        return
    calm()
    until = time.monotonic() + 60 * options.minutes
    missing = [run for run in wanted(plan) if run[0] not in read(options.runs)]
    with ProcessPoolExecutor(options.jobs) as pool:
        doing = set()
        while doing or missing:
            while missing and len(doing) < options.jobs and time.monotonic() < until:
                doing.add(pool.submit(measure, plan, *missing.pop(0)))
            if not doing:
                break
            done = next(as_completed(doing))
            doing.remove(done)
            append(options.runs, done.result(), COLUMNS)
            print(f"{len(missing)} left: {done.result()}", flush=True)


if __name__ == "__main__":
    main()
