"""The adapters that go into a bank: where they are, and what each tells of itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.inspection import updates
from ..bank.head_form import ROOT
from ..bank.heads import NAMES
from ..bank.task import KINDS
from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import CONFIG, AdapterFolder, read_adapter
from ..files.peft_lora import read_lora
from ..math.magnitude import MAGNITUDES
from ..math.update import loras_of
from ..sharing.keys import file_shapes
from ..tuner.saved_adapter import read_saved

#: Reads `A` `(*experts, q, in)` and `B` `(*experts, out, q)` of a module, of experts those that a slice names.
Reader = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Source:
    """An adapter on disk, as low-rank updates of modules."""

    folder: AdapterFolder
    shapes: dict[str, tuple[int, ...]]  # path of a module → `(*experts, out, in)` of its update
    reader: Callable[[], AbstractContextManager[Reader]]  # opens the file once, for many modules
    head: Callable[[], dict[str, Tensor]]  # reads what was trained in full, by its keys in an adapter's file

    @property
    def base_model(self) -> str | None:
        """Name of its base model, where it tells one."""
        return self.folder.config.get("base_model_name_or_path")

    @property
    def task_type(self) -> str | None:
        """PEFT's word for what it was trained for, or `None`."""
        return self.folder.config.get("task_type")

    @property
    def kind(self) -> str | None:
        """What a bank calls its kind of task: classification, regression or causal-lm; `None` where it is not told."""
        return self.folder.task.get("task") or KINDS.get(str(self.task_type))

    def exchanged(self) -> Source:
        """Return the source with `A` and `B` of its experts in each other's place: its update of them is `Aᵀ Bᵀ`."""

        @contextmanager
        def reader() -> Iterator[Reader]:
            with self.reader() as read:

                def exchanged(module: str, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
                    A, B = read(module, own)
                    return (B.mT, A.mT) if A.dim() == 3 else (A, B)

                yield exchanged

        return replace(self, shapes={m: _exchanged(shape) for m, shape in self.shapes.items()}, reader=reader)


def _exchanged(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def has_exchanged_experts(source: Source, known: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `A` and `B` of experts have each other's place, as PEFT wrote them before 0.19.1 for most models.

    Raises:
        CheckpointError: The blocks of all experts are square, so shapes do not tell, and neither does the version.
    """
    experts = {module: shape for module, shape in source.shapes.items() if len(shape) == 3}
    if source.folder.is_lotr:
        return False
    if any(shape[1] != shape[2] for shape in experts.values()):
        return any(known.get(m) == _exchanged(shape) != shape for m, shape in experts.items())
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(source.folder.config.get("peft_version")))
    if experts and (version is None or tuple(map(int, version.groups())) < (0, 19, 1)):
        raise CheckpointError(
            f"{source.folder.path} changes experts whose blocks are square, and {CONFIG} tells no peft_version from "
            "0.19.1 on: most of what PEFT wrote before has A and B in each other's place, and nothing shows which. "
            'If this one was written since, say so there ("peft_version": "0.19.1"); else train it again.'
        )
    return False


def open_source(path: Path) -> Source:
    """Open a PEFT LoRA, or an adapter of this library, and check all that needs none of its numbers."""
    folder = read_adapter(path)
    folder.check_one()
    if folder.is_lotr:
        return _lotr_source(folder)
    lora = read_lora(folder)
    _check_head(path, set(lora.head_keys.values()))
    return Source(folder, lora.shapes, lora.reader, lora.head)


def _lotr_source(folder: AdapterFolder) -> Source:
    saved, path = read_saved(folder), folder.path
    if not MAGNITUDES[saved.config.magnitude].additive:
        raise CheckpointError(
            f"{path} has magnitude={saved.config.magnitude!r}, which rescales the weight, so its update is no low-rank "
            "matrix. Leave it out, or train it without a magnitude."
        )
    if saved.plan.has_biases:
        raise CheckpointError(
            f"{path} has lora_bias=True, and the bias is no part of its update. Leave it out, or train it without."
        )

    @contextmanager
    def reader() -> Iterator[Reader]:
        parts = {target.path: (target, own) for target, own in updates(saved, saved.tensors())}

        def read(module: str, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
            target, of_module = parts[module]
            loras = loras_of([update for _, update in of_module], target.shape, target.experts)[own]
            A, B = (torch.stack(side).float() for side in zip(*loras, strict=True))
            if not target.experts:
                A, B = A[0], B[0]
            if not (A.isfinite().all() and B.isfinite().all()):
                raise CheckpointError(f"The update of {module!r} in {path} is not finite. Train it again.")
            return A, B

        yield read

    _check_head(path, folder.shapes().keys() - file_shapes(saved.plan, factors=True).keys())
    return Source(folder, {t.path: t.weight_shape for t in saved.plan.targets}, reader, saved.head)


def _check_head(path: Path, keys: set[str]) -> None:
    """Refuse an adapter that trained more than its updates and a head: a bank has no place for it."""
    other = sorted(key for key in keys if key.removeprefix(ROOT).partition(".")[0] not in NAMES)
    if other:
        kind = "a bias" if other[0].endswith(".bias") else "a module"
        raise CheckpointError(
            f"{path} holds {other[0]!r}, {kind} that was trained in full. A bank keeps low-rank updates, and heads "
            f"called {' or '.join(NAMES)}. Leave this adapter out, or train it without modules_to_save and bias."
        )


def find_adapters(places: Sequence[str | Path]) -> dict[str, Path]:
    """Return name and folder of every adapter, in the order of their names.

    A name is that of the folder, with as many folders above it as it takes to tell adapters apart.
    """
    folders = [folder for place in places for folder in _folders(str(place))]
    resolved = [folder.resolve() for folder in folders]
    twice = [path for path, times in Counter(resolved).items() if times > 1]
    if twice:
        raise ConfigError(
            f"{twice[0]} is named twice, and would weigh twice in the fit. Name each adapter once."
        )
    if not resolved:
        raise ConfigError("No adapter is named. Name folders, globs, or a text file with a path a line.")
    return dict(sorted(zip(_names(resolved), resolved, strict=True)))


def is_one_adapter(places: Sequence[str]) -> bool:
    """Whether these name one adapter of this library: that becomes a smaller adapter, and no bank."""
    return len(places) == 1 and (Path(places[0]) / CONFIG).is_file() and read_adapter(places[0]).is_lotr


def _folders(place: str) -> list[Path]:
    path = Path(place).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file() and any(path.glob(f"*/{CONFIG}")):
            raise ConfigError(f"{place} is a folder of adapters. Name what is in it: '{place}/*'.")
        return [path]
    if path.is_file() and path.suffix in (".txt", ".list"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        named = [line for line in lines if line and not line.startswith("#")]
        if not named:
            raise ConfigError(f"{place} names no adapter. Write the path of one on every line.")
        beside = (path.parent / line if (path.parent / line).exists() else line for line in named)
        return [folder for line in beside for folder in _folders(str(line))]
    if any(character in place for character in "*?["):
        matches = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))
        found = (match for match in matches if (match / CONFIG).is_file())
        # as a shell does: what is being written lies under a hidden name
        folders = sorted(match for match in found if not match.name.startswith(".") or "/." in place)
        if not folders:
            raise ConfigError(f"{place} matches no folder with {CONFIG}. Check the pattern.")
        return folders
    return [read_adapter(place).path]  # a hub id, or an error that says what is near


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell all of them apart."""
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {path: "/".join(path.parts[-n:]) for path, n in depth.items()}
        times = Counter(names.values())
        same = [path for path, name in names.items() if times[name] > 1 and depth[path] < len(path.parts)]
        if not same:
            return [names[path] for path in paths]
        for path in same:
            depth[path] += 1
