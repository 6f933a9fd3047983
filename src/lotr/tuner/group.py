"""The shared numbers of a group, as a PEFT layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..sharing.blocks import Shape
from ..sharing.keys import FACTORS

if TYPE_CHECKING:
    from .batch_cores import RowsOfCall


class NamedNumbers(nn.Module):
    """Named tensors of an adapter that are no linear's weight; calling it returns them by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, _own(tensor))

    def forward(self) -> dict[str, Tensor]:
        """Return the tensors by name; offloaded ones exist only while the module runs, so it is called."""
        return dict(self.named_parameters(recurse=False))


class SiteCores(nn.Module):
    """The cores that are kept with a module, by name of their part; calling it multiplies by those of one."""

    def __init__(self, cores: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, C in cores.items():
            self.register_parameter(name, _own(C))

    def forward(self, h: Tensor, name: str) -> Tensor:  # (*n, b·r) -> (*n, a·k)
        """Multiply by the cores of a part."""
        return F.linear(h, getattr(self, name))


def linear_from(weight: Tensor) -> nn.Linear:
    """Return a bias-free linear with this weight, without touching the global random state."""
    out_features, in_features = weight.shape
    module = nn.Linear(in_features, out_features, bias=False, device="meta")
    module.weight = _own(weight)
    return module


def _own(tensor: Tensor) -> nn.Parameter:
    """Return a parameter with a storage of its own.

    A slice of a larger tensor would keep the whole in memory, and whoever saves a state dict drops tensors that share a
    storage. It is contiguous, because sharding refuses other layouts.
    """
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a matrix of a module, also when it is offloaded (then without a way back for gradients)."""
    if not hasattr(module, "_hf_hook"):
        weight: Tensor = getattr(module, name)
        return weight
    with align_module_device(module):
        return module.get_parameter(name).detach().clone()


def call(factor: nn.Linear, x: Tensor) -> Tensor:
    """Return what a factor makes of an input.

    Sharded and offloaded weights exist only while their module runs, so the module is called; a group may span devices,
    and only then its weight is brought to the activations.
    """
    weight = factor.weight
    if weight.device == x.device or weight.device.type == "meta" or hasattr(factor, "_hf_hook"):
        result: Tensor = factor(x)
        return result
    return F.linear(x, weight.to(x.device))


def call_transposed(factor: nn.Linear, x: Tensor) -> Tensor:
    """Return the product with the transpose of a factor, for sites that use `V` at the output and `U` at the input."""
    weight = weight_of(factor)
    return F.linear(x, weight.T.to(x.device, x.dtype))


def is_plain(module: nn.Module, dtype: torch.dtype, device: torch.device, name: str = "weight") -> bool:
    """Whether calling a module multiplies by an ordinary tensor, and does nothing else.

    Not so where its weight is sharded, elsewhere, quantised or of another type, or where a hook runs with it.
    """
    weight: Any = getattr(module, name)
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == dtype
        and weight.device == device
        and not weight.is_meta
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def move(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None = None) -> None:
    """Move a part of an adapter; what is on the meta device stays, and an integer type changes nothing."""
    floating = dtype if dtype is not None and dtype.is_floating_point else None
    if device is not None and not any(p.is_meta for p in module.parameters()):
        module.to(device=device, dtype=floating)


class LotrLayer(BaseTunerLayer):
    """What PEFT sees of this method in a model: adapted modules and groups of factors."""

    cast_input_dtype_enabled = True  # PEFT's context sets it on all of them
    scaling: Any

    def drop(self, adapter: str) -> None:
        """Forget the numbers of an adapter, which stays active: it is about to be made anew."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            numbers = getattr(self, name)
            if adapter in numbers:
                del numbers[adapter]


class LotrGroup(nn.Module, LotrLayer):
    """What the sites of one group share, for every adapter that has the group.

    `lotr_U[adapter].weight` is `U` of shape `(o, k)`; `lotr_V[adapter].weight` is `Vᵀ` of shape `(r, i)`;
    `lotr_core[adapter]` has the numbers of a core that is not kept site by site, and what is added to biases;
    `lotr_shared[adapter]` those numbers of a core that stay with the factors.
    """

    adapter_layer_names = (*FACTORS, "lotr_core")
    other_param_names = ("scaling",)
    # a group wraps nothing; code that asks any tuner layer for its base weight gets an answer
    weight: Any = None
    bias: Any = None
    # torch knows no better type of what a module holds than `Tensor | Module`
    lotr_U: Any
    lotr_V: Any
    lotr_core: Any
    lotr_shared: Any
    _active_adapter: Any

    def __init__(self, shape: Shape, scaling: dict[str, float]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.lotr_U = nn.ModuleDict()
        self.lotr_V = nn.ModuleDict()
        self.lotr_core = nn.ModuleDict()
        self.lotr_shared = nn.ModuleDict()
        # one dictionary for the whole model: PEFT's hot-swapping writes it beside whatever tensor it swaps
        self.scaling = scaling
        self.merged_adapters: list[str] = []
        self._home: torch.device | None = None
        # adapter of a bank → what tells the cores of each row of the call that runs
        self.rows: dict[str, RowsOfCall] = {}

    def add(
        self,
        adapter: str,
        U: Tensor,  # (o, k)
        V: Tensor,  # (i, r)
        core: Mapping[str, Tensor],
        of_basis: Sequence[str],
        frozen: bool,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Add the numbers of an adapter where its first member lives: the factors, and the shared ones of the core."""
        self.lotr_U[adapter] = linear_from(U)
        self.lotr_V[adapter] = linear_from(V.T)
        for place, names in ((self.lotr_shared, of_basis), (self.lotr_core, core.keys() - of_basis)):
            if names and core:
                place[adapter] = NamedNumbers(
                    {name: number for name, number in core.items() if name in names}
                )
        if frozen:  # PEFT thaws what it activates, except what is named here
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter: FACTORS}
        self._home = device
        self._move_adapter_to_device_of_base_layer(adapter, device, dtype)

    def core_numbers(self, adapter: str) -> dict[str, Tensor]:
        """Return the numbers of a core that is not kept site by site, and what is added to biases, by name."""
        return self.lotr_core[adapter]() | self.shared_numbers(adapter)

    def shared_numbers(self, adapter: str) -> dict[str, Tensor]:
        """Return those of a core that all tasks on the factors have in common."""
        return self.lotr_shared[adapter]() if adapter in self.lotr_shared else {}

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        # PEFT calls this after loading with `low_cpu_mem_usage`; a group has no base layer to ask
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                move(getattr(self, name)[adapter_name], device or self._home, dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the status in step with the layers; a group has no weight to merge into."""
        names = adapter_names or self.active_adapters
        self.merged_adapters += [n for n in names if n in self.lotr_U and n not in self.merged_adapters]

    def unmerge(self) -> None:
        """Keep the status in step with the layers."""
        self.merged_adapters = []
