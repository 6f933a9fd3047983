"""Memory of a training step, three ways: what autograd saves, what torch allocates at most, what the process takes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from peers import ADAPTERS, make, trained, training_step
from records import calm
from shapes import Batch, batch_for, build

_HIGH_WATER = "VmHWM:"  # of resident memory, in kB


def measure(
    shape: str, batch: int, length: int, method: str, rank: int | None, threads: int
) -> dict[str, int | None]:
    """Return bytes of a training step. To be called in a process of its own.

    Returns:
        saved: Storages that autograd keeps between forward and backward, other than parameters and buffers.
        allocated: Parameters, buffers, and the most that torch had allocated beside them during two steps.
        resident: The most that the process had during two steps; none on an accelerator.
    """
    torch.set_num_threads(threads)
    calm()
    _import_all()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = build(shape, device)
    model, tokens = make(method, rank, shape, base), batch_for(base, batch, length)
    del base  # full fine-tuning has weights of its own
    on_cuda = device.type == "cuda"
    resident = None if on_cuda else resident_peak(training_step(model, tokens))
    return {
        "saved": saved(model, tokens),
        "allocated": cuda_peak(model, tokens) if on_cuda else allocated_peak(model, tokens),
        "resident": resident,
    }


def _import_all() -> None:
    """Use everything once in a tiny model, so that the floor's process too has what libraries import when used."""
    for config in ADAPTERS.values():
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(2, ["0"]))
        model(torch.zeros(1, 4)).sum().backward()
        torch.optim.AdamW(trained(model)).step()


def saved(model: nn.Module, batch: Batch) -> int:
    """Return the bytes of all storages that autograd saves in forward and that are no parameters or buffers."""
    held = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages stay alive, so no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in held:
            kept[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    device = batch.tokens.device.type
    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=device == "cuda"),
    ):
        batch.loss(model)
    return sum(storage.nbytes() for storage in kept.values())


def allocated_peak(model: nn.Module, batch: Batch) -> int:
    """Return parameters and buffers, and the peak of torch's allocator beside them, from the profiler's events."""
    step = training_step(model, batch)
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
        step()
    peak = now = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held_bytes(model) + peak


def cuda_peak(model: nn.Module, batch: Batch) -> int:
    """Return the most that torch had allocated on the accelerator during two steps."""
    torch.cuda.reset_peak_memory_stats()
    step = training_step(model, batch)
    step()
    step()
    return torch.cuda.max_memory_allocated()


def resident_peak(step: Callable[[], None]) -> int:
    """Return the most memory that the process had during two steps; where it cannot be reset, in its whole life."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # sets the high-water mark to what is resident now
    step()
    step()
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(_HIGH_WATER)).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers; shared ones count once."""
    tensors: tuple[Any, ...] = (*model.parameters(), *model.buffers())
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
