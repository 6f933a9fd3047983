"""Tasks of a bank in vLLM: a request whose `model` is a task of the bank in `LOTR_BANK` gets its LoRA.

`register` is an entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..bank import CoreBank
from ..bank.head_form import ROOT
from ..bank.transfer import export
from ..errors import CheckpointError, LotrError
from ..files.adapter_folder import TASK

BANK, CACHE, CACHE_BYTES = "LOTR_BANK", "LOTR_VLLM_CACHE", "LOTR_VLLM_CACHE_BYTES"
#: Ranks that vLLM has kernels for; a LoRA is padded with zeros to one of them.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Parameters of experts that vLLM takes a LoRA on, together.
EXPERTS = {"gate_up_proj", "down_proj"}
#: What vLLM takes in full beside a LoRA.
HEADS = {"classifier", "score"}
_IN_USE = 60.0  # seconds after its last use in which a folder is not removed: somebody may be reading it
_LOG = logging.getLogger(__name__)


class LoraFolders:
    """Tasks of a bank as folders in vLLM's form; the least recently used ones are removed, and made again on demand.

    The size of `root` is kept below `most` bytes. Several processes may share it: a folder is there whole or not at
    all, and never changes.
    """

    def __init__(self, bank: CoreBank, root: Path, most: int) -> None:
        self.bank, self.root, self.most = bank, root, most
        self._beside = partial(tempfile.TemporaryDirectory, dir=root, prefix=".")  # on the same file system
        experts = [target.path.rpartition(".") for target in bank.basis.plan.targets if target.experts]
        # module of experts → parameters that tasks change
        self.experts = {path: {own for other, _, own in experts if other == path} for path, *_ in experts}

    def make(self, name: str) -> Path:
        """Return the folder of a task as the bank has it now; the name is no part of the path."""
        checksum = self.bank.about(name)["checksum"]
        folder = self.root / hashlib.sha256(f"{checksum} {name}".encode()).hexdigest()[:32]
        if not _use(folder):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(name, folder)
            self._evict()
        return folder

    def _write(self, name: str, folder: Path) -> None:
        task = self.bank.get(name)
        if self.bank.basis.plan.has_biases:
            raise CheckpointError(f"Task {name!r} has lora_bias=True, and vLLM's LoRAs have no biases.")
        heads = {key.removeprefix(ROOT).split(".")[0] for key in task.head}
        if other := ", ".join(sorted(heads - HEADS)):
            raise CheckpointError(f"Task {name!r} has {other} in full, which vLLM does not take.")
        for module, parameters in self.experts.items():
            if parameters != EXPERTS:
                raise CheckpointError(
                    f"Task {name!r} changes {', '.join(sorted(parameters))} of {module!r}, and vLLM takes LoRAs on "
                    f"{' and '.join(sorted(EXPERTS))} of experts together. Answer with `lotr serve`."
                )
        with self._beside() as temporary:
            made = Path(temporary) / "lora"
            export(self.bank.basis, task, made, as_lora=True, pad_rank=RANKS)
            for file in ("README.md", TASK):  # nothing that vLLM reads
                (made / file).unlink(missing_ok=True)
            try:
                made.replace(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process was quicker
                    raise

    def _evict(self) -> None:
        """Remove folders, the least recently used first, until the others fit."""
        used = []
        for folder in self.root.iterdir():
            written = folder.name.startswith(".")  # by somebody who may need long, or was killed
            try:
                at = folder.stat().st_mtime + (3600 if written else 0)
                used.append((at, sum(file.stat().st_size for file in folder.iterdir()), folder))
            except (FileNotFoundError, NotADirectoryError):  # another process removed it
                continue
        total = sum(size for _, size, _ in used)
        for at, size, folder in sorted(used):
            if total <= self.most or time.time() - at < _IN_USE:
                return
            with self._beside() as away, suppress(FileNotFoundError):  # another process removed it
                folder.replace(Path(away) / "removed")  # a folder is there whole or not at all
            total -= size


class BankResolver:
    """What vLLM asks for a LoRA that it does not know; see `vllm.lora.resolver.LoRAResolver`."""

    def __init__(self, folders: LoraFolders) -> None:
        self.folders = folders

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return a `LoRARequest`, or `None` where the bank has no such task, or is for another base model."""
        ours, name = self.folders.bank.base_model, base_model_name
        if ours not in (None, name) and Path(ours).resolve() != Path(name).resolve():
            return None
        try:
            if lora_name not in self.folders.bank:
                return None
            path = await asyncio.to_thread(self.folders.make, lora_name)
        except LotrError as error:
            _LOG.warning("%s", error)
            return None
        from vllm.lora.request import LoRARequest

        # without experts it is no field of older versions
        form = {"is_3d_lora_weight": True} if self.folders.experts else {}
        # vLLM gives it a number of its own
        return LoRARequest(lora_name, 1 + int(path.name[:7], 16), str(path), **form)


def register() -> None:
    """Let vLLM find the tasks of the bank in `LOTR_BANK`; without it nothing happens."""
    place = os.environ.get(BANK)
    if not place:
        return
    from vllm.lora import worker_manager
    from vllm.lora.resolver import LoRAResolverRegistry

    bank = CoreBank.open(place)
    own = hashlib.sha256(str(bank.path.resolve()).encode()).hexdigest()[:16]
    root = Path(os.environ.get(CACHE) or _memory()) / own
    folders = LoraFolders(bank, root, int(os.environ.get(CACHE_BYTES, 4 << 30)))
    LoRAResolverRegistry.register_resolver("lotr", BankResolver(folders))
    manager = worker_manager.WorkerLoRAManager
    load = manager._load_adapter
    if getattr(load, "makes_folders", False):
        return

    def load_adapter(self: Any, lora_request: Any) -> Any:
        """Load a LoRA; a folder that was removed meanwhile is made again."""
        path = Path(lora_request.lora_path)
        if path.parent == root and not _use(path):
            lora_request.lora_path = str(folders.make(lora_request.lora_name))
        return load(self, lora_request)

    load_adapter.makes_folders = True  # type: ignore[attr-defined]
    manager._load_adapter = load_adapter


def _use(folder: Path) -> bool:
    """Keep a folder from being removed soon; returns whether it is there."""
    try:
        os.utime(folder)
    except FileNotFoundError:
        return False
    return True


def _memory() -> Path:
    """Return a folder in memory where there is one, this user's own."""
    memory = Path("/dev/shm")
    root = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return root / f"lotr-{os.getuid()}"
