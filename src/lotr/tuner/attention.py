"""What a model tells of its attention: the heads of a weight, and the projections of a fused one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..blocks import Heads, Shape

#: Own names of modules whose output features are heads, and of those whose input features are.
_QUERY = {"q_proj", "query", "q", "q_lin", "query_proj", "q_attn", "to_q", "wq"}
_KEY_VALUE = {"k_proj", "key", "k", "k_lin", "key_proj", "to_k", "wk"}
_KEY_VALUE |= {"v_proj", "value", "v", "v_lin", "value_proj", "to_v", "wv"}
_OUTPUT = {"o_proj", "out_proj", "o", "out_lin", "to_out"}
#: These are output projections below an attention, and other things elsewhere.
_OUTPUT_BELOW_ATTENTION = {"dense", "c_proj", "wo", "Wo"}
#: Weights that hold query, key and value below each other. `query_key_value` is not among them: the models that
#: have it put the three of one head side by side, head after head.
_FUSED = {"c_attn", "qkv", "Wqkv", "qkv_proj"}
_INTERLEAVED = {"codegen"}

_HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def heads_of(model: nn.Module, path: str, shape: Shape) -> Heads | None:
    """Return how a module's features are attention heads, or `None` when they are not.

    Args:
        model: The model.
        path: Path of the module.
        shape: `(out, in)` features.

    Returns:
        Size of a head, and whether heads are rows (query, key, value) or columns (the output projection).
    """
    axis = _axis(path)
    size = head_size(model, path)
    if axis is None or size is None or shape[axis] % size:
        return None
    return Heads(size, axis)


def _axis(path: str) -> int | None:
    parts = path.split(".")
    name = parts[-1]
    if name in _QUERY | _KEY_VALUE | _FUSED:
        return 0
    below_attention = any("att" in part.lower() for part in parts[:-1])
    return 1 if name in _OUTPUT or (name in _OUTPUT_BELOW_ATTENTION and below_attention) else None


def head_size(model: nn.Module, path: str) -> int | None:
    """Return the features of one attention head, from the attention around a module or the configuration."""
    found = _first(_around(model, path), _HEAD_SIZE)
    if found is not None:
        return found
    config = _config(model)
    heads, width = _first([config], _HEADS), getattr(config, "hidden_size", None)
    return width // heads if heads and width else None


def fused_projections(model: nn.Module, path: str, shape: Shape) -> tuple[tuple[str, int], ...]:
    """Return the projections of a fused weight with their output features, in order; nothing for other weights."""
    config = _config(model)
    if path.rpartition(".")[2] not in _FUSED or getattr(config, "model_type", None) in _INTERLEAVED:
        return ()
    size = head_size(model, path)
    places = [*_around(model, path), config]
    heads = _first(places, _HEADS)
    if not size or not heads:
        return ()
    few = _first(places, _KEY_VALUE_HEADS) or heads
    if getattr(config, "multi_query", False):
        few = 1
    query, key = heads * size, few * size
    if shape[0] == query + 2 * key:
        return ("query", query), ("key", key), ("value", key)
    return (("key", key), ("value", key)) if shape[0] == 2 * key else ()


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules above a module, nearest first, each before its children: the attention is among them."""
    parts = path.split(".")
    for end in range(len(parts) - 1, max(0, len(parts) - 4), -1):
        above = model.get_submodule(".".join(parts[:end]))
        yield above
        yield from above.children()


def _first(places: Any, names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
