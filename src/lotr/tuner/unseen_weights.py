"""Weights that their module's parent reads without calling the module, so that an update of it would be missed."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

import torch
from torch import nn

from ..errors import PlanError

#: What is read of a weight without using its numbers.
_PROPERTIES = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "numel"}
#: Methods that make, start or load a module and take no part in its output.
_SETUP = {"__init__", "reset_parameters", "_reset_parameters", "_init_weights", "tie_weights", "extra_repr"}
#: Classes whose reading lies behind an option that is off: a pre-training layout (Bloom), and query states that come
#: from outside, which no model of transformers gives (DeBERTa).
_BEHIND_AN_OPTION = {"BloomAttention", "BloomMLP", "DisentangledSelfAttention"}


def check_is_called(model: nn.Module, path: str) -> None:
    """Refuse a module whose parent multiplies by its weight without calling it.

    Attention of torch, fused encoder layers and the fused kernels of state-space models do so. What a parent does is
    read from the source of its class, so classes of remote code are seen too.

    Raises:
        PlanError: The message says what to leave out.
    """
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    fused_encoder = isinstance(parent, nn.TransformerEncoderLayer)
    if fused_encoder and not torch.backends.mha.get_fastpath_enabled():
        return
    read = _read_weights(type(parent))  # type: ignore[arg-type]  # a module is hashed by its class
    if name not in read:
        return
    more = ", or call torch.backends.mha.set_fastpath_enabled(False) first" if fused_encoder else ""
    raise PlanError(
        f"Target module {path!r} cannot be adapted: {type(parent).__name__} multiplies by its weight without calling "
        f"it, so the update would be missed. Leave it out, for example with exclude_modules={sorted(read)!r}{more}."
    )


@cache
def _read_weights(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of the children whose weights a class reads without calling them."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__name__ in _BEHIND_AN_OPTION:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made without a file
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name not in _SETUP:
                names |= _read_in(method)
    return frozenset(names)


def _read_in(method: ast.FunctionDef) -> set[str]:
    """Return `name` of every `self.name.weight` whose numbers a method reads."""
    harmless: set[ast.AST] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr in _PROPERTIES:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            harmless.update(node.args)
    return {
        node.value.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.ctx, ast.Load)
        and node not in harmless
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    }
