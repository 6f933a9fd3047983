"""What a model tells of its attention: the heads of a weight, and the projections of a fused one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
    or heads of several sizes, are not cut. Heads are rows of query, key and value, columns of the output projection.
    """
    name, sizes = path.rpartition(".")[2], _head_sizes(model, path)
    if sizes is None:
        return None
    size, heads, few = sizes
    if name in _FUSED:
        return Heads(size, 0) if fused_projections(model, path, shape) else None
    if name in _KEY_VALUE:
        return Heads(size, 0) if shape[0] == few * size else None
    if name in _QUERY:
        return Heads(size, 0) if shape[0] == heads * size else None
    below_attention = any("att" in part.lower() for part in path.split(".")[:-1])
    output = name in _OUTPUT or (name in _OUTPUT_BELOW_ATTENTION and below_attention)
    return Heads(size, 1) if output and shape[1] == heads * size else None


def is_query_key_value(path: str) -> bool:
    """Whether a module is a query, key or value by its name, alone or fused."""
    return path.rpartition(".")[2] in _QUERY | _KEY_VALUE | _FUSED


def fused_projections(model: nn.Module, path: str, shape: Shape) -> tuple[tuple[str, int], ...]:
    """Return the projections of a fused weight with their output features, in order; nothing for other weights."""
    config = getattr(model, "config", None)
    interleaved = getattr(config, "model_type", None) in _INTERLEAVED and not getattr(
        config, "multi_query", False
    )
    if path.rpartition(".")[2] not in _FUSED or interleaved:
        return ()
    sizes = _head_sizes(model, path)
    if sizes is None:
        return ()
    size, heads, few = sizes
    query, key = heads * size, few * size
    if shape[0] == query + 2 * key:
        return ("query", query), ("key", key), ("value", key)
    return (("key", key), ("value", key)) if shape[0] == 2 * key else ()


def _head_sizes(model: nn.Module, path: str) -> tuple[int, int, int] | None:
    """Return the features of one attention head, and the number of heads of queries, and of keys and values.

    They are those of the attention around a module, or of the configuration.
    """
    config, around = getattr(model, "config", None), list(_around(model, path))
    heads = _first_number([*around, config], _HEADS)
    few = _first_number([*around, config], _KEY_VALUE_HEADS) or heads
    if getattr(config, "multi_query", False):
        few = 1
    size = _first_number(around, _HEAD_SIZE)
    width, of_all = _first_number([config], ("hidden_size",)), _first_number([config], _HEADS)
    if size is None and width and of_all:
        size = width // of_all
    return (size, heads, few) if size and heads and few else None


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules above a module, nearest first, each before its children: the attention is among them."""
    parts = path.split(".")
    for end in range(len(parts) - 1, max(0, len(parts) - 4), -1):
        above = model.get_submodule(".".join(parts[:end]))
        yield above
        yield from above.children()


def _first_number(places: Iterable[object], names: tuple[str, ...]) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
