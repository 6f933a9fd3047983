"""Tasks in and out of a bank: from an adapter saved on its basis, and back to one, or to plain LoRA."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.export import export as write_lora
from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import (
    WEIGHTS,
    AdapterFolder,
    check_replaceable,
    save_tensors,
    write_config,
    write_task,
)
from ..files.atomic import CHECKSUM, check_apart, whole_folder
from ..files.fingerprint import difference
from ..tuner.config import LotrConfig
from ..tuner.saved_adapter import factors_of, hash_of, read_saved
from .basis import Basis
from .clusters import Cluster
from .head_form import ROOT
from .heads import NAMES
from .task import TASK_TYPES, Task, kind_and_labels

#: What the bank, or a task's own fields, know already.
KNOWN = {"task", "labels", "base_model", "base_fingerprint", CHECKSUM}


def task_of(basis: Basis, name: str, adapter: AdapterFolder, metadata: Mapping[str, Any]) -> Task:
    """Return a saved adapter as a task of a bank; see `CoreBank.from_adapter`."""
    adapter.check_one()
    config, tensors = read_saved(adapter).config, adapter.tensors()
    _check_same_update(basis, adapter, config)
    factors = factors_of(tensors)
    basis_hash = config.basis_hash if config.refers_to_basis else hash_of(factors)
    expected = basis.description.basis_hash
    # a file that stands alone has the factors of the bank's groups, and of no others
    cluster = basis.whole if basis_hash == expected else None
    if cluster is None and not config.refers_to_basis:
        cluster = _cluster_with(basis, factors)
    if cluster is None:
        raise CheckpointError(
            f"{adapter.path} was trained on factors with hash {basis_hash}, and those of the bank in {basis.path} have "
            f"{expected}. Cores mean nothing beside other factors; train the task with "
            f"basis={str(basis.path)!r}."
        )
    check_fingerprint(basis, adapter.path, adapter.task)
    number = None if cluster is basis.whole else basis.clusters.index(cluster)
    numbers = basis.layout.fill(number, cluster.layout.flatten(tensors))
    head = {key: tensors[key] for key in tensors.keys() - basis.layout.shapes.keys() - factors.keys()}
    if foreign := sorted(key for key in head if ".lotr_" in key):
        raise CheckpointError(
            f"{adapter.path} has {len(foreign)} tensors that a task of the bank in {basis.path} lacks, first "
            f"{foreign[0]!r}. Train the task with basis={str(basis.path)!r}."
        )
    recorded = {key: value for key, value in adapter.task.items() if key not in KNOWN}
    kind, labels = kind_and_labels(adapter.task, head, config.task_type)
    return Task(name, numbers, head, labels, kind, {**recorded, **metadata})


def _cluster_with(basis: Basis, factors: dict[str, Tensor]) -> Cluster | None:
    """Return those factors of a bank, all or a cluster's, that an adapter has in its own file, rounded or exported."""
    of_bank, own = basis.factors(), _hash_in_float(factors)
    known = (basis.whole, *basis.clusters)
    return next((some for some in known if _hash_in_float(some.factors(of_bank)) == own), None)


def _hash_in_float(factors: Mapping[str, Tensor]) -> str:
    return hash_of({key: factor.float() for key, factor in factors.items()})


def check_fingerprint(basis: Basis, path: Path, record: Mapping[str, Any]) -> None:
    """Refuse an adapter whose `task.json` tells that it was trained on other weights than those a bank is for."""
    mine, theirs = basis.description.base_fingerprint, record.get("base_fingerprint")
    if differs := difference(mine, theirs):
        raise CheckpointError(
            f"{path} was trained on another base model ({record.get('base_model')!r}) than the bank in {basis.path} is "
            f"for ({basis.description.base_model!r}): {differs}. Put it into a bank of its own."
        )


def _check_same_update(basis: Basis, adapter: AdapterFolder, config: LotrConfig) -> None:
    """Refuse what would make another update of the same numbers."""
    for field in ("scaling", "magnitude", "core", "modes", "blocks", "lora_bias"):
        theirs, mine = getattr(config, field), getattr(basis.config, field)
        if theirs != mine:
            raise CheckpointError(
                f"{adapter.path} has {field}={theirs!r}, and the bank in {basis.path} has {field}={mine!r}. Train the "
                f"task with basis={str(basis.path)!r} and the bank's own settings."
            )


def export(
    basis: Basis,
    task: Task,
    output: Path,
    as_lora: bool = False,
    refer: bool = False,
    overwrite: bool = False,
    pad_rank: int | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Write a task as an adapter; see `CoreBank.export`, and `lotr.export` for `pad_rank`."""
    if as_lora and refer:
        raise ConfigError("A plain LoRA stands alone; it cannot refer to a basis. Leave out one of the two.")
    if pad_rank is not None and not as_lora:
        raise ConfigError(
            f"pad_rank={pad_rank} is for a LoRA. Leave it out, or export with --lora (as_lora=True)."
        )
    check_replaceable(output, overwrite)
    check_apart(output, "base model", basis.description.base_model)
    if not as_lora:
        with whole_folder(output, overwrite) as folder:
            numbers = _write(basis, task, folder, refer)
        size = (output / WEIGHTS).stat().st_size
        return {"task": task.name, "numbers": numbers, "bytes": size, "output": str(output)}
    with tempfile.TemporaryDirectory() as alone:
        _write(basis, task, Path(alone), refer=False)
        report = write_lora(alone, output, overwrite, pad_rank)
    return {"task": task.name} | {
        key: report[key] for key in ("numbers", "bytes", "rank", "modules", "output")
    }


def _write(basis: Basis, task: Task, folder: Path, refer: bool) -> int:
    """Write the files of an adapter; returns how many numbers of the method it has."""
    number, numbers = (None, task.numbers) if refer else basis.layout.cut(task.numbers)
    cluster = basis.whole if number is None else basis.clusters[number]
    factors = (
        {} if refer else {key: U.float() for key, U in cluster.factors(basis.factors()).items()}
    )  # as the cores
    own = {**cluster.layout.unflatten(numbers), **factors}
    save_tensors({key: tensor.clone() for key, tensor in {**own, **task.head}.items()}, folder)
    write_config(folder, _config(basis, cluster, task, refer))
    kind = task.task or ("classification" if task.labels else None)
    if kind is not None or task.metadata:
        known = {name: getattr(basis.description, name) for name in ("base_model", "base_fingerprint")}
        known |= {} if kind is None else {"task": kind}
        write_task(folder, {**task.metadata, **known, "labels": list(task.labels)})
    return sum(tensor.numel() for tensor in own.values())


def _config(basis: Basis, cluster: Cluster, task: Task, refer: bool) -> dict[str, Any]:
    config = basis.config if refer else copy.copy(cluster.config)
    config.trainable, config.inference_mode = "cores", True
    config.task_type = TASK_TYPES.get(str(task.task), config.task_type)
    # a head of the same name as the basis had; else the modules that its keys name, a head of several as one
    paths = (key.removeprefix(ROOT) for key in task.head)
    modules = sorted({p.partition(".")[0] if p.startswith(NAMES) else p.rpartition(".")[0] for p in paths})
    config.modules_to_save = (config.modules_to_save or modules) if task.head else None
    return config.to_dict()
