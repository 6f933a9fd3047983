"""The adapted module as one step of autograd, wherever every number is a plain tensor at hand.

Wrappers put numbers elsewhere or do something when a module is called: sharding, offloading, hooks, quantised bases.
There the modules are called one after the other (`layer.py`), and the result is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers.pytorch_utils import Conv1D

from ..math import linear_in_graph
from ..math import matmul as kernels
from ..math.fused_linear import adapted_linear
from ..math.linear_products import PartOfLinear, Place
from ..math.orders import AUTOGRAD, choose_order
from ..math.update import scaled

if TYPE_CHECKING:
    from .adapted import Adapted
    from .layer import LotrLinear


class InputProducts:
    """`x V` of the inputs of one forward pass: parts that share `V` and read the same tensor share the product.

    One object for a model, with a memory for each thread. Outside of `one_pass` nothing is kept, so that no activation
    outlives its pass; nor are products of inference mode, where nothing tells that an input has been written to.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Keep products while a forward pass, or a generation, runs."""
        if torch.compiler.is_compiling():  # the one step is not taken
            yield
            return
        outer = getattr(self._here, "kept", None)
        self._here.kept = {}
        try:
            yield
        finally:
            self._here.kept = outer

    def find(self, key: object, x: Tensor) -> Tensor | None:
        """Return the product of this very input, if it is known."""
        kept = getattr(self._here, "kept", None)
        if not kept or x.is_inference():
            return None
        seen, version, h = kept.get(_in_this_mode(key, x), (None, 0, None))
        return h if seen is x and version == x._version else None

    def keep(self, key: object, x: Tensor, h: Tensor) -> None:
        """Keep the product of an input, in place of the one before."""
        kept = getattr(self._here, "kept", None)
        if kept is not None and not x.is_inference():
            kept[_in_this_mode(key, x)] = (x, x._version, h)

    def __reduce__(self) -> tuple[type[InputProducts], tuple[()]]:
        return InputProducts, ()  # a copy, too, starts with nothing


def fits(adapted: Adapted, x: Tensor) -> bool:
    """Whether the one step computes what calling the modules would."""
    return not _something_listens() and _numbers_are_at_hand(adapted, x)


def _numbers_are_at_hand(adapted: Adapted, x: Tensor) -> bool:
    layer, state = adapted.layer, adapted.state
    base = layer.base_layer
    if type(x) not in (Tensor, nn.Parameter) or x.is_nested:
        return False
    if state.order == AUTOGRAD or (state.dropout and layer.training):
        return False
    if type(base) not in (nn.Linear, Conv1D) or not _only_multiplies(base):
        return False
    W = base.weight
    if W.requires_grad or not _at_hand(W, W, x.device) or (x.dtype != W.dtype and _autocast(x) is None):
        return False
    for member in state.members:
        part, group = member.part, member.group
        if adapted.adapter in group.rows or (part.grid[1] > 1 and part.columns[1] != layer.in_features):
            return False
        factors = [group.lotr_U[adapted.adapter], group.lotr_V[adapted.adapter]]
        if part.group.core.by_site and not part.name:
            factors.append(layer.lotr_C[adapted.adapter])
        for factor in factors:
            if type(factor) is not nn.Linear or not _only_multiplies(factor):
                return False
            if not _at_hand(factor.weight, W, x.device):
                return False
    return True


def output(adapted: Adapted, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
    """Return base output plus update, before the magnitude; what norms can use of it is left with the adapter."""
    layer, state = adapted.layer, adapted.state
    W, bias = layer.base_layer.weight, layer.base_layer.bias
    W = W.T if layer.fan_in_fan_out else W
    dtype = _autocast(x) or W.dtype
    tokens, gradients = x.numel() // x.shape[-1], torch.is_grad_enabled()
    out_features, in_features = W.shape
    order = choose_order(tokens, out_features, in_features, dtype, state.order, gradients)
    if _asks_for_products(adapted):
        order = replace(order, with_norms=True)
    parts, keys = [], []
    for member in state.members:
        part, group = member.part, member.group
        Vt, U = group.lotr_V[adapted.adapter].weight, group.lotr_U[adapted.adapter].weight
        C = scaled(adapted.core(member), layer.scaling[adapted.adapter])
        place = Place(part.rows[0], part.columns[0], part.grid)
        # other parts of this module, or other modules, may have read this input through the same V
        key = (id(Vt), dtype, part.columns[0], part.grid[1]) if part.group.shares_inputs else None
        h = None if key is None else group.products.find(key, x)
        parts.append(PartOfLinear(place, Vt.to(dtype), C.to(dtype), U.to(dtype), h))
        keys.append(key)
    y, products = adapted_linear(
        x.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype), parts, order
    )
    if order.with_norms:
        adapted.WV = products.pop()
    for member, key, h in zip(state.members, keys, products, strict=True):
        if key is not None and h is not None:
            member.group.products.keep(key, x, h)
    return y


def _asks_for_products(adapted: Adapted) -> bool:
    """Whether norms will take `W V` without a way back, of a `V` for which it is not kept."""
    state = adapted.state
    frozen = state.members[0].group.frozen(adapted.adapter)
    return state.magnitude.scales_outputs and not state.norm_gradient and frozen is None


def output_in_graph(adapted: Adapted, x: Tensor) -> Tensor | None:
    """Return base output plus update as one operation of a graph that is being compiled, where graphs have that."""
    layer, state = adapted.layer, adapted.state
    if (
        not torch.compiler.is_compiling()
        or hooks._has_any_global_hook()
        or not _numbers_are_at_hand(adapted, x)
        or not kernels.taken_in_graph(x, layer.base_layer.weight)
    ):
        return None
    W, bias = layer.base_layer.weight, layer.base_layer.bias
    parts = []
    for member in state.members:
        part, group = member.part, member.group
        Vt, U = group.lotr_V[adapted.adapter].weight, group.lotr_U[adapted.adapter].weight
        C = scaled(adapted.core(member), layer.scaling[adapted.adapter])
        shared = part.group.shares_inputs and torch.is_grad_enabled() and Vt.shape[1] == layer.in_features
        h = kernels.in_graph(x, Vt, factor=True) if shared else None
        h = None if h is None else h.reshape(-1, len(Vt))
        parts.append(PartOfLinear(Place(part.rows[0], part.columns[0], part.grid), Vt, C, U, h))
    W = W.T if layer.fan_in_fan_out else W
    numbers = [number for part in parts for number in (part.Vt, part.C, part.U)]
    if any(number.dtype != W.dtype for number in (*numbers, bias) if number is not None):
        return None  # the modules, called one by one, say what they think of that
    return linear_in_graph.take(x, W, bias, parts, state.order)


def in_graph(layer: LotrLinear, x: Tensor) -> Tensor | None:
    """Return the output of the base layer in a graph that is being compiled, where that has a way of its own."""
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) or not _can_be_taken(base, x):
        return None
    return kernels.in_graph(x, base.weight.T if layer.fan_in_fan_out else base.weight, base.bias)


def factor_in_graph(factor: nn.Module, x: Tensor) -> Tensor | None:
    """Return what a factor makes of an input, likewise."""
    if type(factor) is not nn.Linear or not _can_be_taken(factor, x):
        return None
    return kernels.in_graph(x, factor.weight, factor=True)


def _can_be_taken(module: nn.Module, x: Tensor) -> bool:
    weight: Any = module.weight
    return (
        torch.compiler.is_compiling()
        and not hooks._has_any_global_hook()
        and _only_multiplies(module)
        and type(x) in (Tensor, nn.Parameter)
        and _at_hand(weight, weight, x.device)
    )


def _in_this_mode(key: object, x: Tensor) -> object:
    return key, torch.is_grad_enabled(), x.requires_grad


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    applies = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(kind) if applies else None


def _something_listens() -> bool:
    # a compiler makes one step of its own; a tracer cannot save ours; transforms, and modes that see every operation
    # (selective checkpointing), need plain operations; global hooks, calls of modules
    return (
        torch.compiler.is_compiling()
        or hooks._has_any_global_hook()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _only_multiplies(module: nn.Module) -> bool:
    """Whether calling a module does what its class does, and nothing else."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _at_hand(weight: Tensor, like: Tensor, device: torch.device) -> bool:
    """Whether a weight is a plain tensor: not sharded, not elsewhere, not of another type."""
    plain = type(weight) in (nn.Parameter, Tensor)
    return plain and weight.device == device and weight.dtype == like.dtype and not weight.is_meta
