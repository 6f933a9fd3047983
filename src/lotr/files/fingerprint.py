"""What tells base models apart: sixteen numbers of every tensor, from its first to its last.

They are kept, not hashed, because one model in float32, bfloat16 and float16 has numbers that agree to rounding alone.
Numbers are looked up by row and column, so they are found again where a vocabulary has grown.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

_N = 16
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ROUNDING = 2**-7  # of two numbers that were rounded to bfloat16, each by half of its last bit
_TINY = 1e-7  # what float16 cannot tell from zero
_LONGEST = 1 << 26  # bytes of a fingerprint

_Shape = tuple[int, ...]
_Samples = dict[str, tuple[_Shape, Tensor]]  # by name of a tensor


def fingerprint(model: nn.Module, trained: Collection[str] = ()) -> str | None:
    """Return numbers of all tensors of a base model, as text; see `changed`.

    Weights that are quantised, sharded or on the meta device tell nothing; offloaded ones are read one after the other,
    as a call of the model reads them. A tensor that has several names counts once. `None` where nothing is told.

    Args:
        model: The base model, without an adapter.
        trained: Names of modules that are no part of it, because an adapter brings its own: new heads.
    """
    samples = {
        name: [shape, _numbers(weight, shape).view(torch.int16).tolist()]
        for name, shape, weight in _tensors(model)
        if not any(f".{module}." in f".{name}" for module in trained)
    }
    return base64.b64encode(zlib.compress(json.dumps(samples).encode(), 9)).decode() if samples else None


def changed(recorded: str, now: nn.Module | str) -> list[str]:
    """Return the names of the tensors that are others than when a fingerprint was taken.

    Compared are tensors that both have and that tell their numbers: of a matrix with more rows or fewer, such as an
    embedding for another vocabulary, the rows that both have; in a fingerprint `now`, such a matrix tells nothing.
    """
    before, after = _read(recorded), {}
    if isinstance(now, str):
        for name, (shape, numbers) in _read(now).items():
            at_same_places = name in before and shape == before[name][0]
            after[name] = shape, numbers if at_same_places else numbers * torch.nan
    else:
        for name, shape, weight in _tensors(now, twice=True):
            if name in before:
                after[name] = shape, _numbers(weight, before[name][0])
    return sorted(name for name in before.keys() & after.keys() if not _agree(before[name], after[name]))


def difference(recorded: str | None, now: nn.Module | str | None) -> str:
    """Return what tells another base model than the recorded one; nothing where it is that, or one tells nothing."""
    odd = changed(recorded, now) if recorded and (isinstance(now, nn.Module) or now) else []
    return f"the fingerprint differs in {len(odd)} tensors, first {odd[0]!r}" if odd else ""


def _tensors(model: nn.Module, twice: bool = False) -> Iterator[tuple[str, _Shape, Tensor]]:
    """Yield name, shape and weight of parameters and saved buffers that are plain numbers."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        offloaded: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        unsaved = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in unsaved or (id(tensor) in seen and not twice):
                continue
            seen.add(id(tensor))
            is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _PLAIN and tensor.numel()
            if is_plain and not (tensor.is_meta and offloaded is None):
                # of a module that does not run, accelerate reads the weight
                weight = offloaded[name] if tensor.is_meta else tensor.detach()
                yield f"{path}.{name}".removeprefix("."), tuple(tensor.shape), weight


def _numbers(weight: Tensor, recorded: _Shape) -> Tensor:  # (16,)
    """Return numbers at places that follow from the recorded shape, in bfloat16; NaN where there is no such row."""
    weight = weight if weight.ndim else weight[None]
    width, last = math.prod(weight.shape[1:]), math.prod(recorded) - 1
    numbers = torch.full((_N,), torch.nan, dtype=torch.bfloat16)
    for n in range(_N):
        row, column = divmod(last * n // (_N - 1), width)
        if 0 <= row < len(weight):
            numbers[n] = weight[row].reshape(-1)[column]
    return numbers


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
        return {
            name: (
                tuple(map(int, shape)),
                torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).view(_N),
            )
            for name, (shape, bits) in json.loads(content).items()
        }
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError, zlib.error) as error:
        raise CheckpointError(f"The fingerprint of a base model is damaged: {error}") from None
