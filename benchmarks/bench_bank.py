"""Time of a mixed batch: 64 rows with 64 tasks beside one task, a large bank beside a small one, PEFT beside both.

    python benchmarks/bench_bank.py --json out/bench_bank.json
    python benchmarks/bench_bank.py --shape llama-1b --large 0

Everything runs in one process, on the packaged MiniLM or a model of random numbers, in turns whose order is drawn anew
each round; a ratio is the median over rounds of the ratio within a round. All tasks are in memory, as they are once
they have been used. Then tasks of the large bank are used one after the other, with few of them in memory: does the
process grow?
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from lotr import CoreBank, LotrConfig, Task
from peers import sharing
from records import begin, machine, parser, progress, show
from shapes import SHAPES, build, minilm
from timing import interleaved

#: What is compared with what.
RATIOS = {
    "64 tasks / one task": ("bank, 64 tasks", "bank, one task"),
    "large bank / small bank": ("large bank, 64 tasks", "bank, 64 tasks"),
    "one task / ordinary adapter": ("bank, one task", "ordinary adapter"),
    "64 tasks / base model": ("bank, 64 tasks", "base model"),
    "PEFT: 64 adapters / one": ("PEFT, 64 adapters", "PEFT, one adapter"),
    "PEFT: 64 adapters / base model": ("PEFT, 64 adapters", "base model"),
}

Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """A base model, and what is adapted on it."""

    model: nn.Module
    targets: list[str] | str
    rank: int

    def base(self) -> nn.Module:
        """Return a model on the same weights."""
        return sharing(self.model).eval()

    def config(self, kind: type[PeftConfig], **more: object) -> PeftConfig:
        head = ["classifier"] if hasattr(self.model, "classifier") else None
        return kind(r=self.rank, target_modules=self.targets, exclude_modules=head, **more)


def settings(shape: str | None, rank: int, device: torch.device) -> dict[str, Setting]:
    """Return what is measured, by the modules that are adapted."""
    if shape is not None:
        model: nn.Module = build(shape, device)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2).to(device)
    attention = ["query", "value"] if shape is None else ["q_proj", "v_proj"]
    targets = {"query, value": attention, "all linears": "all-linear"}
    return {name: Setting(model, modules, rank) for name, modules in targets.items()}


def bank_of(folder: Path, tasks: int, setting: Setting) -> CoreBank:
    """Make a bank with tasks of random numbers."""
    get_peft_model(setting.base(), setting.config(LotrConfig)).save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", folder / "basis")
    generator = torch.Generator().manual_seed(0)
    size = bank.layout.size

    def made() -> Iterator[Task]:
        for n in range(tasks):
            yield Task(f"task {n}", torch.randn(size, generator=generator) / 16)

    bank.add_many(made())
    return bank


def loras(names: list[str], setting: Setting) -> nn.Module:
    """Return a model with that many LoRA adapters of PEFT, with random numbers."""
    config = setting.config(LoraConfig, init_lora_weights=False)
    model = get_peft_model(setting.base(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def runs(folder: Path, setting: Setting, rows: int, length: int, large: int) -> dict[str, Run]:
    """Return what is timed, by name."""
    generator, device = torch.Generator().manual_seed(0), next(setting.model.parameters()).device
    vocabulary = setting.model.config.vocab_size
    tokens = torch.randint(vocabulary // 2, vocabulary, (rows, length), generator=generator).to(device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    names = [f"task {n}" for n in range(rows)]
    bank = bank_of(folder / "small", 100, setting)
    model = bank.wrap(setting.base(), capacity=rows)
    lora = loras([f"lora {n}" for n in range(rows)], setting)
    one, plain = get_peft_model(setting.base(), bank.config).eval(), setting.base()
    for number in one.parameters():  # an update of zero takes a way of its own
        if number.requires_grad and not number.any():
            nn.init.normal_(number, std=1 / 16)
    found: dict[str, Run] = {
        "base model": lambda: plain(**batch),
        "ordinary adapter": lambda: one(**batch),
        "bank, one task": lambda: model(**batch, task_ids=names[:1] * rows),
        "bank, 64 tasks": lambda: model(**batch, task_ids=names),
        "PEFT, one adapter": lambda: lora(**batch, adapter_names=["lora 0"] * rows),
        "PEFT, 64 adapters": lambda: lora(**batch, adapter_names=[f"lora {n}" for n in range(rows)]),
    }
    if large:
        big = large_bank(folder, setting, large).wrap(setting.base(), capacity=rows)
        spread = [f"task {n * (large // rows)}" for n in range(rows)]
        found["large bank, 64 tasks"] = lambda: big(**batch, task_ids=spread)
    return found


def large_bank(folder: Path, setting: Setting, large: int) -> CoreBank:
    made = folder / "large" / "bank"
    return CoreBank.open(made) if made.is_dir() else bank_of(made.parent, large, setting)


def growth(bank: CoreBank, base: nn.Module, rows: int) -> dict[str, float]:
    """Return the resident memory in MB after the first and after all of up to 20,000 tasks, four batches in memory."""
    model = bank.wrap(base, capacity=4 * rows)
    names = list(islice(bank.names(), 20_000))
    batches = [names[at : at + rows] for at in range(0, len(names), rows)]
    found: dict[str, float] = {
        "tasks": len(names),
        "numbers of all, MB": 4e-6 * len(names) * bank.layout.size,
    }
    with torch.inference_mode():
        for n, batch in enumerate(batches, 1):
            model(input_ids=torch.full((len(batch), 4), 1000), task_ids=batch)
            if n in (max(1, len(batches) // 10), len(batches)):
                found[f"resident after {min(n * rows, len(names)):,} tasks, MB"] = resident()
    return found


def resident() -> float:
    """Return the resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Print the tables and write them as JSON."""
    parsed = parser(__doc__, "bank")
    parsed.add_argument("--shape", choices=SHAPES, help="default: the packaged MiniLM")
    parsed.add_argument("--rows", type=int, default=64, help="rows of a batch, each with a task of its own")
    parsed.add_argument("--length", type=int, default=32, help="tokens a row")
    parsed.add_argument(
        "--large", type=int, default=100_000, help="tasks of the large bank (query, value); 0: none"
    )
    parsed.set_defaults(rounds=21)
    options = parsed.parse_args()
    device = begin(options)
    reports = []
    for modules, setting in settings(options.shape, options.rank, device).items():
        large = options.large if modules == "query, value" else 0
        with tempfile.TemporaryDirectory() as folder:
            timed = runs(Path(folder), setting, options.rows, options.length, large)
            with progress(modules, (options.rounds + 1) * len(timed)) as bar, torch.inference_mode():
                tick = partial(bar.advance, bar.task_ids[0])
                samples = interleaved(timed, options.rounds, device, tick)
            memory = {}
            if large and sys.platform == "linux":
                bank = large_bank(Path(folder), setting, large)
                memory = growth(bank, setting.base(), options.rows)
        ratios = {
            name: samples.ratio(run, reference)
            for name, (run, reference) in RATIOS.items()
            if run in samples.seconds
        }
        rows = [
            [f"{name}, ms", *(f"{1e3 * s:.1f}" for s in asdict(samples.spread(name)).values())]
            for name in timed
        ]
        rows += [
            [name, *(f"{value:.3f}" for value in asdict(spread).values())] for name, spread in ratios.items()
        ]
        rows += [[name, f"{number:,.0f}", "", ""] for name, number in memory.items()]
        title = f"{modules}: {options.rows} rows of {options.length} tokens"
        show(title, ("", "median", "quartiles", ""), rows)
        spreads = {name: asdict(samples.spread(name)) for name in timed}
        report = {"modules": modules, "seconds": spreads, "memory": memory}
        reports.append({**report, "ratios": {name: asdict(spread) for name, spread in ratios.items()}})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "options": vars(options), "reports": reports}
    options.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
