"""Memory of a training step above the frozen model's: PEFT's methods, full fine-tuning and ours.

    python benchmarks/bench_memory.py --short

Three measures, of the same training step as in bench_train_step.py, each method in a process of its own. *saved*: the
storages that autograd keeps between forward and backward, parameters aside. *allocated*: the peak of torch's own
allocator, parameters included. *resident*: the peak of the process, which knows pages and not tensors.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from peers import ADAPTERS, FROZEN, LORA, case_options, make, settings, trained, training_step
from records import Row, begin, calm, parser, peak_mb, progress, show, write
from shapes import Batch, batch_for, build

MEASURES = ("saved", "allocated", "resident")
HEADER = (
    *("batch × tokens", "method"),
    *(name for measure in MEASURES for name in (f"{measure}, MB", "above frozen", "of LoRA")),
)


def measure_one(
    shape: str, batch: int, length: int, method: str, rank: int, threads: int
) -> dict[str, int | None]:
    """Return the bytes of a training step by every measure. To be called in a process of its own."""
    torch.set_num_threads(threads)
    calm()
    _use_all()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = build(shape, device)
    model, tokens = make(method, rank, shape, base), batch_for(base, batch, length)
    del base  # full fine-tuning has weights of its own
    on_cuda = device.type == "cuda"
    resident = None if on_cuda else resident_peak(training_step(model, tokens))
    allocated = cuda_peak(model, tokens) if on_cuda else allocated_peak(model, tokens)
    return {"saved": saved(model, tokens), "allocated": allocated, "resident": resident}


def _use_all() -> None:
    """Use everything once in a tiny model, so that the frozen model's process has the libraries' own memory too."""
    for config in ADAPTERS.values():
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(2, ["0"]))
        model(torch.zeros(1, 4)).sum().backward()
        torch.optim.AdamW(trained(model)).step()


def saved(model: nn.Module, batch: Batch) -> int:
    """Return the bytes of all storages that autograd saves in forward and that are no parameters or buffers."""
    known = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # they stay alive, so no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in known:
            storages[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    device = batch.tokens.device.type
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
    ):
        batch.loss(model)
    return sum(storage.nbytes() for storage in storages.values())


def allocated_peak(model: nn.Module, batch: Batch) -> int:
    """Return parameters and buffers, and the peak of torch's allocator beside them, from the profiler's events."""
    step = training_step(model, batch)
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
        step()
    peak = now = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    tensors = (*model.parameters(), *model.buffers())
    return peak + sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def cuda_peak(model: nn.Module, batch: Batch) -> int:
    """Return the most that torch had allocated on the accelerator during two steps."""
    torch.cuda.reset_peak_memory_stats()
    step = training_step(model, batch)
    step()
    step()
    return torch.cuda.max_memory_allocated()


def resident_peak(step: Callable[[], None]) -> int | None:
    """Return the most memory that the process had during two steps; None where the system does not tell."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    forget.write_text("5")  # sets the high-water mark to what is resident now
    step()
    step()
    return int(2**20 * peak_mb())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure(setting: tuple[str, int, int, list[str]], options: argparse.Namespace) -> list[Row]:
    """Measure all methods, one process each, one after the other."""
    shape, size, length, methods = setting
    found: dict[str, dict[str, int | None]] = {}
    with progress(shape, len(methods)) as bar:
        for method in methods:
            with get_context("forkserver").Pool(1) as pool:
                arguments = (shape, size, length, method, options.rank, options.threads)
                found[method] = pool.apply(measure_one, arguments)
            bar.advance(bar.task_ids[0])
    above = {
        method: {m: bytes_of[m] - found[FROZEN][m] for m in MEASURES if bytes_of[m] is not None}
        for method, bytes_of in found.items()
    }
    where = {"shape": shape, "batch": size, "length": length}
    return [
        {**where, "method": method, "rank": options.rank, **found[method], "above_frozen": above[method]}
        | {"of_lora": {m: round(more / above[LORA][m], 4) for m, more in above[method].items()}}
        for method in methods
    ]


def cells(row: Row) -> list[str]:
    """Return a row of the table, in MB."""
    shown = [f"{row['shape']} {row['batch']}×{row['length']}", row["method"]]
    for name in MEASURES:
        above, share = row["above_frozen"].get(name), row["of_lora"].get(name)
        shown.append("" if row[name] is None else f"{row[name] / 1e6:.1f}")
        shown += ["", ""] if above is None else [f"{above / 1e6:+.1f}", f"{share:.2f}"]
    return shown


def main() -> None:
    """Measure, print the table, write the record."""
    parsed = parser(__doc__, "memory")
    case_options(parsed)
    options = parsed.parse_args()
    device = begin(options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler of each child writes to the terminal
    # the server of children imports once for all of them; it looks for modules where its environment says
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    get_context("forkserver").set_forkserver_preload(["bench_memory"])
    rows: list[Row] = []
    for setting in settings(options, device, variants=False):
        rows += measure(setting, options)
        write(options.json, rows)
    show(f"Memory of a training step, rank {options.rank}", HEADER, [cells(row) for row in rows], 2)


if __name__ == "__main__":
    main()
