"""A fit becomes a bank: a basis of its factors, and a task an adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from ..bank import CoreBank, Task
from ..bank.task import DTYPES
from ..files.adapter_folder import CONFIG, fingerprint, save_tensors, write_task
from ..files.atomic import write_json
from ..sharing.keys import group_keys
from ..tuner.config import LotrConfig
from .project import Projection
from .report import Outcome
from .sources import Source, open_source
from .stack import Tick

#: What of an adapter's `task.json` the bank, or a task's own fields, know already.
_KNOWN = {"task", "labels", "base_model", "base_fingerprint", "weights_sha256"}


def write_bank(path: Path, config: LotrConfig, model: nn.Module, outcome: Outcome, tick: Tick) -> None:
    """Write a bank: a basis of the factors, and a task an adapter.

    Args:
        path: Folder to make.
        config: Configuration of the basis.
        model: The base model, for its fingerprint.
        outcome: The fit; what every task loses is added to it.
        tick: Called as tasks are done.
    """
    plan = outcome.plan
    tensors: dict[str, Tensor] = {}
    for group in plan.groups:
        U, V = outcome.fits[group.name].factors(group.core.r)
        keys = group_keys(group)
        tensors |= {keys["U"]: U.float().contiguous(), keys["V"]: V.T.float().contiguous()}
    with tempfile.TemporaryDirectory() as basis:
        save_tensors(tensors, Path(basis))
        write_json(Path(basis) / CONFIG, config.to_dict())
        sample = fingerprint(model, [target.path for target in plan.targets])
        write_task(Path(basis), {"base_model": config.base_model_name_or_path, "base_fingerprint": sample})
        bank = CoreBank.create(path, basis, dtype=outcome.dtype)
    with bank:
        projection = Projection(plan, tensors, 1.0, DTYPES[outcome.dtype])
        bank.add_many(tasks_of(bank, projection, outcome, tick))


def tasks_of(bank: CoreBank, projection: Projection, outcome: Outcome, tick: Tick) -> Iterator[Task]:
    """Yield every adapter as a task of a bank, and note what it loses."""
    stack, at = outcome.stack, 0
    batches = stack.batches(projection.plan.groups, False, lambda done, of: tick("Cores", done, of))
    for batch in batches():
        numbers, lost = projection(batch)
        n = len(next(iter(numbers.values())))
        for t, entry in enumerate(stack.entries[at : at + n]):
            own = bank.layout.flatten({key: tensor[t] for key, tensor in numbers.items()})
            error = outcome.add(entry, {module: float(loss[t]) for module, loss in lost.items()})
            yield task_of(open_source(entry.name, entry.path), own, error)
        at += n


def task_of(source: Source, numbers: Tensor, error: float) -> Task:
    """Return an adapter as a task, with its head and what its folder tells."""
    head = source.head()
    labels = tuple(source.record.get("labels", ()))
    kind = source.kind
    if head and not labels and kind == "classification":
        n = min(tensor.shape[0] for tensor in head.values() if tensor.dim())
        labels = tuple(f"LABEL_{label}" for label in range(n)) if n > 1 else ()
        kind = "classification" if n > 1 else "regression"
    recorded = {key: value for key, value in source.record.items() if key not in _KNOWN}
    metadata = {**recorded, "compressed_from": str(source.path), "error": round(error, 9)}
    return Task(source.name, numbers, head, labels, kind, metadata)
