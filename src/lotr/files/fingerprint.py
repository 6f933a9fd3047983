"""What tells base models apart: sixteen numbers of every tensor, from its first to its last.

They are kept, not hashed, because one model in float32, bfloat16 and float16 has numbers that agree to rounding alone.
Numbers are looked up by row and column, so they are found again where a vocabulary has grown.
"""

from __future__ import annotations

import base64
import json
import math
import mmap
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError

_N = 16
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OF_NUMPY = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_ROUNDING = 2**-7  # of two numbers that were rounded to bfloat16, each by half of its last bit
_TINY = 1e-7  # what float16 cannot tell from zero
_LONGEST = 1 << 26  # bytes of a fingerprint

_Shape = tuple[int, ...]
_Samples = dict[str, tuple[_Shape, Tensor]]  # by name of a tensor


def fingerprint(model: nn.Module, trained: Collection[str] = ()) -> str | None:
    """Return numbers of all tensors of a base model, as text; see `changed`.

    Weights that are quantised, sharded or on the meta device tell nothing; of offloaded ones no more is read than these
    numbers. A tensor that has several names counts once. `None` where no tensor tells anything.

    Args:
        model: The base model, without an adapter.
        trained: Names of modules that are no part of it, because an adapter brings its own: new heads.
    """
    samples = {
        name: [shape, _numbers(weights, shape, shape).view(torch.int16).tolist()]
        for name, shape, weights in _tensors(model)
        if not any(f".{module}." in f".{name}" for module in trained)
    }
    return base64.b64encode(zlib.compress(json.dumps(samples).encode(), 9)).decode() if samples else None


def changed(recorded: str, now: nn.Module | str) -> list[str]:
    """Return the names of the tensors that are others than when a fingerprint was taken.

    Compared are tensors that both have and that tell their numbers: of a matrix with more rows or fewer, such as an
    embedding for another vocabulary, the rows that both have; in a fingerprint `now`, such a matrix tells nothing.
    """
    before = _read(recorded)
    if isinstance(now, str):
        after = {name: pair for name, pair in _read(now).items() if name in before}
        after = {
            name: (shape, numbers if shape == before[name][0] else numbers * torch.nan)
            for name, (shape, numbers) in after.items()
        }
    else:
        after = {
            name: (shape, _numbers(weights, shape, before[name][0]))
            for name, shape, weights in _tensors(now, twice=True)
            if name in before
        }
    return sorted(name for name, pair in after.items() if not _agree(before[name], pair))


def _tensors(model: nn.Module, twice: bool = False) -> Iterator[tuple[str, _Shape, Any]]:
    """Yield name and shape of parameters and saved buffers that are plain numbers, and what slices are taken of."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        unsaved = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in unsaved or (id(tensor) in seen and not twice):
                continue
            seen.add(id(tensor))
            is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _PLAIN and tensor.numel()
            if is_plain and not (tensor.is_meta and offloaded is None):
                weights = _offloaded(offloaded, name) if tensor.is_meta else tensor.detach()
                yield f"{path}.{name}".removeprefix("."), tuple(tensor.shape), weights


def _offloaded(weights: Any, name: str) -> Any:
    """Return where accelerate keeps a weight of a module that does not run; it reads whole tensors, and this none."""
    key = f"{weights.prefix}{name}"
    entry = getattr(weights.dataset, "index", {}).get(key)
    if entry is None or key in weights.dataset.state_dict:
        return weights[name]
    file, at, kind = Path(str(weights.dataset.save_folder)) / f"{key}.dat", 0, entry.get("dtype", "")
    shape = entry.get("shape", ())
    if "safetensors_file" in entry:  # opened as such, the whole file would be read
        file = Path(entry["safetensors_file"])
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            told = json.loads(opened.read(length))[entry.get("weight_name", key)]
        at, kind, shape = 8 + length + told["data_offsets"][0], told["dtype"], told["shape"]
    kind = _OF_NUMPY.get(kind, kind)
    mapped: Any = np.memmap(file, kind.replace("bfloat16", "int16"), "c", at, tuple(shape) or (1,))
    if hasattr(mmap, "MADV_RANDOM"):  # no pages around the numbers
        mapped._mmap.madvise(mmap.MADV_RANDOM)
    tensor = torch.from_numpy(mapped)
    return (tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor).view(tuple(shape))


def _numbers(weights: Any, shape: _Shape, recorded: _Shape) -> Tensor:  # (16,)
    """Return numbers at places that follow from the recorded shape, in bfloat16; NaN where there is no such place."""
    numbers = [torch.tensor(torch.nan)] * _N
    last = math.prod(recorded) - 1
    for n in range(_N) if _alike(shape, recorded) else ():
        place = np.unravel_index(last * n // (_N - 1), recorded)
        if not shape or place[0] < shape[0]:
            numbers[n] = weights[tuple(slice(at, at + 1) for at in place)].reshape(()).float()
    return torch.stack([number.cpu() for number in numbers]).to(torch.bfloat16)


def _alike(shape: _Shape, other: _Shape) -> bool:
    """Whether two shapes differ in rows at most."""
    return len(shape) == len(other) and shape[1:] == other[1:]


def _agree(before: tuple[_Shape, Tensor], after: tuple[_Shape, Tensor]) -> bool:
    (shape, one), (other_shape, other) = before, after
    told = ~(one.isnan() | other.isnan())
    return _alike(shape, other_shape) and torch.allclose(
        one[told].float(), other[told].float(), _ROUNDING, _TINY
    )


def _read(text: str) -> _Samples:
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), _LONGEST)
        samples = {}
        for name, (shape, numbers) in json.loads(content).items():
            sizes, bits = tuple(map(int, shape)), torch.tensor(numbers, dtype=torch.int16)
            if min(sizes, default=1) < 1 or math.prod(sizes) >= 2**63:
                raise ValueError(f"{name!r} has no shape {sizes}")
            samples[str(name)] = sizes, bits.view(torch.bfloat16).view(_N)
        return samples
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError, zlib.error) as error:
        raise CheckpointError(f"The fingerprint of a base model is damaged: {error}") from None
