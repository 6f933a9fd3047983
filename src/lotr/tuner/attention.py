"""What a model tells of its attention: the heads of a weight, and the projections of a fused one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..sharing.blocks import Heads, Shape

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
#: Models in which the three of one head stand side by side there too (gpt_bigcode: unless it is multi-query).
_INTERLEAVED = {"codegen", "gpt_bigcode"}

_HEAD_SIZE = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def heads_of(model: nn.Module, path: str, shape: Shape) -> Heads | None:
    """Return how a module's features are attention heads, or `None` when they are not.

    The features must be as many as the model says that all heads have together; a query with a gate beside each head,
    or heads of several sizes, are not cut.

    Args:
        model: The model.
        path: Path of the module.
        shape: `(out, in)` features.

    Returns:
        Size of a head, and whether heads are rows (query, key, value) or columns (the output projection).
    """
    name, size, (heads, few) = path.rpartition(".")[2], head_size(model, path), head_counts(model, path)
    if size is None or heads is None or few is None:
        return None
    if name in _FUSED:
        return Heads(size, 0) if fused_projections(model, path, shape) else None
    if name in _KEY_VALUE:
        return Heads(size, 0) if shape[0] == few * size else None
    if name in _QUERY:
        return Heads(size, 0) if shape[0] == heads * size else None
    below_attention = any("att" in part.lower() for part in path.split(".")[:-1])
    output = name in _OUTPUT or (name in _OUTPUT_BELOW_ATTENTION and below_attention)
    return Heads(size, 1) if output and shape[1] == heads * size else None


def head_counts(model: nn.Module, path: str) -> tuple[int | None, int | None]:
    """Return the number of heads of queries, and of keys and values."""
    places = [*_around(model, path), _config(model)]
    heads = _first_number(places, _HEADS)
    if getattr(_config(model), "multi_query", False):
        return heads, 1
    return heads, _first_number(places, _KEY_VALUE_HEADS) or heads


def head_size(model: nn.Module, path: str) -> int | None:
    """Return the features of one attention head, from the attention around a module or the configuration."""
    found = _first_number(_around(model, path), _HEAD_SIZE)
    if found is not None:
        return found
    config = _config(model)
    heads, width = _first_number([config], _HEADS), getattr(config, "hidden_size", None)
    return width // heads if heads and width else None


def fused_projections(model: nn.Module, path: str, shape: Shape) -> tuple[tuple[str, int], ...]:
    """Return the projections of a fused weight with their output features, in order; nothing for other weights."""
    config, size = _config(model), head_size(model, path)
    model_type = getattr(config, "model_type", None)
    interleaved = model_type in _INTERLEAVED and not getattr(config, "multi_query", False)
    heads, few = head_counts(model, path)
    if path.rpartition(".")[2] not in _FUSED or interleaved or not size or not heads or not few:
        return ()
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


def _first_number(places: Any, names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
