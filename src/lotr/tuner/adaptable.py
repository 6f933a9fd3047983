"""Which modules can be adapted: linear ones that the model calls, whose weights are where an adapter can stay."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import PlanError

#: What is read of a weight without using its numbers.
_PROPERTIES = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "numel"}
#: Methods that make, start or load a module and take no part in its output.
_SETUP = {"__init__", "reset_parameters", "_reset_parameters", "_init_weights", "tie_weights", "extra_repr"}
#: Classes whose reading lies behind an option that is off: a pre-training layout (Bloom), and query states that come
#: from outside, which no model of transformers gives (DeBERTa).
_BEHIND_AN_OPTION = {"BloomAttention", "BloomMLP", "DisentangledSelfAttention"}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a `Linear`, a `Conv1D` or a quantised linear."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and getattr(backend, "layer_type", None) == "linear"


def check_adaptable(model: nn.Module, path: str, base_layer: nn.Module) -> None:
    """Refuse a module that cannot be adapted.

    Raises:
        PlanError: It is not linear, does more than multiply, the model reads its weight without calling it, or PEFT
            took the model apart. The message says what to do.
    """
    if not is_linear(base_layer):
        raise PlanError(
            f"Target module {path!r} ({type(base_layer).__name__}) is not supported. Currently, only Linear, "
            "Conv1D and quantised linears can be adapted; leave it out with exclude_modules, or train it in "
            "full with modules_to_save."
        )
    if _returns_more(type(base_layer)):  # type: ignore[arg-type]  # a module is hashed by its class
        raise PlanError(
            f"Target module {path!r} cannot be adapted: {type(base_layer).__name__} is linear, and its forward does "
            f"more than multiply. Leave it out with exclude_modules=[{path.rpartition('.')[2]!r}]."
        )
    _check_is_called(model, path)
    _check_offload(model, path, base_layer)


def _check_is_called(model: nn.Module, path: str) -> None:
    """Refuse a module whose parent multiplies by its weight without calling it.

    Attention of torch, fused encoder layers and the fused kernels of state-space models do so. What a parent does is
    read from the source of its class, so classes of remote code are seen too.
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


def _check_offload(model: nn.Module, path: str, base_layer: nn.Module) -> None:
    """Refuse a base model that PEFT took apart while it loads an adapter.

    `PeftModel.from_pretrained` takes the hooks off an offloaded model and lays its own index of files over it, in which
    numbers that belong to no module of the base have no place.
    """
    weight: Any = getattr(base_layer, "weight", None)
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    taken_apart = weight is not None and weight.is_meta and not hasattr(base_layer, "_hf_hook")
    if taken_apart and devices & {"cpu", "disk"}:
        raise PlanError(
            f"The weight of {path!r} is offloaded, and PeftModel.from_pretrained would lose the shared factors on such "
            "a model. Make the adapter first, model = get_peft_model(base, LotrConfig.from_pretrained(folder)), and "
            "then read its numbers: set_peft_model_state_dict(model, load_peft_weights(folder))."
        )


@cache
def _read_weights(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of the children whose weights a class reads without calling them."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__name__ in _BEHIND_AN_OPTION:
            continue
        for method in _methods(base):
            if method.name not in _SETUP:
                names |= _read_in(method)
    return frozenset(names)


@cache
def _returns_more(cls: type[nn.Module]) -> bool:
    """Whether a class of linear modules returns several tensors, as routers do, or multiplies in groups."""
    own = next((base for base in cls.__mro__ if "forward" in vars(base)), nn.Linear)
    if own in (nn.Linear, Conv1D):
        return False
    return any(
        (isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple))
        or (isinstance(node, ast.Attribute) and ast.unparse(node) == "self.weight.view")
        for method in _methods(own)
        if method.name == "forward"
        for node in ast.walk(method)
    )


def _methods(cls: type) -> list[ast.FunctionDef]:
    """Return the source of the methods of a class; none where it was made without a file."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


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
