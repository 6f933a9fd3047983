"""The adapted module and the shared factors of a group, as PEFT layers."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import delta
from ..magnitudes import Magnitude
from ..sites import Shape

_HALF = (torch.float16, torch.bfloat16)


def linear_from(weight: Tensor) -> nn.Linear:
    """Return a bias-free linear with this weight, without touching the global random state."""
    out_features, in_features = weight.shape
    module = nn.Linear(in_features, out_features, bias=False, device="meta")
    module.weight = nn.Parameter(weight.contiguous())  # sharding refuses other layouts
    return module


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a factor as an ordinary tensor, also when it is offloaded."""
    with align_module_device(module):
        return module.weight.detach().clone() if hasattr(module, "_hf_hook") else module.weight.detach()


def _call(factor: nn.Module, x: Tensor) -> Tensor:
    # sharded and offloaded weights exist only while their module runs, so the module is called; a group
    # may span devices, and only then its weight is brought to the activations
    weight = factor.weight
    if weight.device == x.device or weight.device.type == "meta" or hasattr(factor, "_hf_hook"):
        return factor(x)
    return F.linear(x, weight.to(x.device))


class LotrLayer(BaseTunerLayer):
    """What PEFT sees of this method in a model: adapted modules and groups of factors."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False unless a subclass knows better."""
        return False


class LotrGroup(nn.Module, LotrLayer):
    """The shared factors of one group, for every adapter that has the group.

    `lotr_U[adapter].weight` is `U` of shape `(o, k)`; `lotr_V[adapter].weight` is `Vᵀ` of shape `(r, i)`.
    """

    adapter_layer_names = ("lotr_U", "lotr_V")
    other_param_names = ("scaling",)
    # a group wraps nothing; code that asks any tuner layer for its base weight gets an answer
    weight = None
    bias = None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.lotr_U = nn.ModuleDict()
        self.lotr_V = nn.ModuleDict()
        # PEFT's hot-swapping writes the scaling next to every tensor that it swaps
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._home: torch.device | None = None

    def add(self, adapter: str, U: Tensor, V: Tensor) -> None:  # (o, k), (i, r)
        """Add the factors of an adapter."""
        self.lotr_U[adapter] = linear_from(U)
        self.lotr_V[adapter] = linear_from(V.T)
        self.scaling[adapter] = 1.0

    def place(self, adapter: str, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move an adapter's factors to where its first member lives; meta and integer types are left."""
        floating = dtype if dtype is not None and dtype.is_floating_point else None
        for factor in (self.lotr_U[adapter], self.lotr_V[adapter]):
            if device is not None and not factor.weight.is_meta:
                factor.to(device=device, dtype=floating)
        self._home = device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        # PEFT calls this after loading with `low_cpu_mem_usage`; a group has no base layer to ask
        if adapter_name in self.lotr_U:
            self.place(adapter_name, device or self._home, self.lotr_U[adapter_name].weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the status in step with the layers; a group has no weight to merge into."""
        names = adapter_names or self.active_adapters
        self.merged_adapters += [n for n in names if n in self.lotr_U and n not in self.merged_adapters]

    def unmerge(self) -> None:
        """Keep the status in step with the layers."""
        self.merged_adapters = []


@dataclass
class SiteState:
    """What an adapter has at one module beside the numbers of its core."""

    group: LotrGroup  # looked up at each forward: wrappers replace the modules inside it
    magnitude: Magnitude
    dropout: float


class LotrLinear(nn.Module, LotrLayer):
    """A linear module (`Linear`, `Conv1D` or a quantised linear) with LoTR updates.

    `lotr_C[adapter].weight` is the core `C` of shape `(k, r)`.
    """

    adapter_layer_names = ("lotr_C",)
    other_param_names = ("lotr_site", "scaling")

    def __init__(self, base_layer: nn.Module, shape: Shape, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.cast_input_dtype_enabled = True
        self.lotr_C = nn.ModuleDict()
        # plain dictionary: the groups are registered once, on the root of the model
        self.lotr_site: dict[str, SiteState] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: Any = None

    def add(self, adapter: str, C: Tensor, state: SiteState, scaling: float) -> None:  # (k, r)
        """Add the core of an adapter."""
        self.lotr_C[adapter] = linear_from(C)
        self.lotr_site[adapter] = state
        self.scaling[adapter] = scaling

    # ------------------------------------------------------------------ forward

    def update(self, adapter: str, x: Tensor) -> Tensor:  # (*n, i) -> (*n, o)
        """Return the update that an adapter adds to the output."""
        site = self.lotr_site[adapter]
        U, V = site.group.lotr_U[adapter], site.group.lotr_V[adapter]
        core = self.lotr_C[adapter]
        x = self._cast_input_dtype(x, core.weight.dtype)
        x = F.dropout(x, site.dropout, self.training) if site.dropout else x
        return delta.apply(x, lambda x: _call(V, x), core, lambda h: _call(U, h), self.scaling[adapter])

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the adapted output; row `i` of a batch uses `adapter_names[i]` when names are given."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, result, adapter_names)
        if self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lotr_C:
                result = self.lotr_site[adapter].magnitude.output(result, self.update(adapter, x))
        return result.to(dtype)

    def _mixed(self, x: Tensor, base: Tensor, adapter_names: list[str]) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        result = base.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter not in self.lotr_C:  # "__base__", or an adapter that does not touch this module
                continue
            rows = torch.tensor(
                [i for i, name in enumerate(adapter_names) if name == adapter], device=x.device
            )
            update = self.update(adapter, x[rows])
            result[rows] = self.lotr_site[adapter].magnitude.output(base[rows], update).to(base.dtype)
        return result

    # ------------------------------------------------------------------ merge

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:  # (o, k), (k, r), (i, r)
        """Return `U`, `C`, `V` of an adapter at this module, detached, on one device."""
        group = self.lotr_site[adapter].group
        C = weight_of(self.lotr_C[adapter])
        U, Vt = weight_of(group.lotr_U[adapter]), weight_of(group.lotr_V[adapter])
        return U.to(C.device), C, Vt.T.to(C.device)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `ΔW` in the layout of the base weight: `(out, in)`, or `(in, out)` for `Conv1D`."""
        U, C, V = self.factors(adapter)
        dtype = C.dtype
        if dtype in _HALF:
            U, C, V = U.float(), C.float(), V.float()
        dW = delta.dense(U, C, V, self.scaling[adapter])
        return (dW.T if self.fan_in_fan_out else dW).to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight; the untouched weight is kept, so `unmerge` is exact.

        Args:
            safe_merge: Refuse a result that is not finite, leaving the weight as it was.
            adapter_names: Default: the active adapters.

        Raises:
            ValueError: `safe_merge` found NaN or infinity.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lotr_C:
                continue
            W = self.get_base_weight()
            dW = self.get_delta_weight(adapter).to(W.device)
            exact = torch.promote_types(W.dtype, dW.dtype)
            merged = self.lotr_site[adapter].magnitude.weight(W.to(exact), dW.to(exact)).to(W.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                )
            if self._unmerged is None:
                self._unmerged = self._keep()
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        if self._unmerged is None:
            return
        if self.quantization_backend is not None:
            self.base_layer = self._unmerged
        else:
            weight = self.get_base_layer().weight
            weight.data = self._unmerged.to(device=weight.device, dtype=weight.dtype)
        self._unmerged = None

    def _keep(self) -> Any:
        # quantising again would not give the same numbers, so the whole (small) quantised layer is kept;
        # of a plain weight the tensor itself, because merging puts a new one in its place
        quantised = self.quantization_backend is not None
        return copy.deepcopy(self.base_layer) if quantised else self.get_base_weight()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is `W + ΔW`, so that plain LoRA can hold it."""
        return adapter_name in self.lotr_site and self.lotr_site[adapter_name].magnitude.additive

    def __repr__(self) -> str:
        return "lotr." + super().__repr__()
