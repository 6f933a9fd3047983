"""The adapted module, as a PEFT layer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import delta
from ..magnitudes import Magnitude
from ..sites import Shape
from .group import LotrGroup, LotrLayer, linear_from, weight_of

_HALF = (torch.float16, torch.bfloat16)


def _call(factor: nn.Module, x: Tensor) -> Tensor:
    # sharded and offloaded weights exist only while their module runs, so the module is called; a group
    # may span devices, and only then its weight is brought to the activations
    weight = factor.weight
    if weight.device == x.device or weight.device.type == "meta" or hasattr(factor, "_hf_hook"):
        return factor(x)
    return F.linear(x, weight.to(x.device))


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
        for (
            site
        ) in self.lotr_site.values():  # a forward pass with adapters disabled unmerges the layers alone
            site.group.unmerge()
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
