"""The adapted module, as a PEFT layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..math.magnitude import MAGNITUDES
from ..math.norms import BaseWeight, Kept
from ..sharing.blocks import Shape
from . import direct
from .adapted import Adapted, Member, SiteState
from .config import LotrConfig
from .group import LotrLayer, NamedNumbers, linear_from, move


class LotrLinear(nn.Module, LotrLayer):
    """A linear module (`Linear`, `Conv1D` or a quantised linear) with updates in factored form.

    `lotr_C[adapter].weight` holds the cores that belong to the module's sites, side by side as their blocks are,
    shape `(a·k, b·r)`; `lotr_C[adapter][part]` where the module has parts in several groups.
    `lotr_magnitude[adapter]` has the numbers of the magnitude.
    """

    adapter_layer_names = ("lotr_C", "lotr_magnitude")
    other_param_names = ("lotr_site", "scaling")
    # torch knows no better type of what a module holds than `Tensor | Module`
    base_layer: Any
    lotr_C: Any
    lotr_magnitude: Any
    _active_adapter: Any

    def __init__(
        self, base_layer: nn.Module, shape: Shape, scaling: dict[str, float], **quantization: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.cast_input_dtype_enabled = True
        self.lotr_C = nn.ModuleDict()
        self.lotr_magnitude = nn.ModuleDict()
        # plain dictionary: the groups are registered once, on the root of the model
        self.lotr_site: dict[str, SiteState] = {}
        self.scaling = scaling  # one dictionary for the whole model, see LotrGroup
        self._kept = Kept()
        self.merged_adapters: list[str] = []
        self._unmerged: Any = None

    def add(
        self,
        adapter: str,
        members: Sequence[Member],
        cores: Mapping[str, Tensor],  # part's name -> (a·k, b·r)
        config: LotrConfig,
        empty: bool,
    ) -> None:
        """Add an adapter: the parts of the module, and the cores that are kept with it."""
        if cores:
            self.lotr_C[adapter] = linear_from(cores[""]) if "" in cores else NamedNumbers(cores)
        magnitude = MAGNITUDES[str(config.magnitude)]
        self.lotr_site[adapter] = SiteState(tuple(members), magnitude, config.dropout, config.norm_gradient)
        self.scaling[adapter] = config.scaling
        shapes = magnitude.shapes(self.out_features, self.in_features)
        if shapes:
            numbers = (
                {n: torch.empty(s) for n, s in shapes.items()} if empty else magnitude.init(self.base_weight)
            )
            self.lotr_magnitude[adapter] = NamedNumbers(numbers)
        self._move_adapter_to_device_of_base_layer(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        home, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name in self.lotr_C:
            move(self.lotr_C[adapter_name], device or home, dtype)
        if adapter_name in self.lotr_magnitude:
            # in float32 on a half-precision base too: a rounded norm would change the base model
            move(self.lotr_magnitude[adapter_name], device or home)

    def adapted(self, adapter: str) -> Adapted:
        """Return what an adapter has at this module."""
        return Adapted(self, adapter, self.lotr_site[adapter])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and what was kept for it."""
        super().delete_adapter(adapter_name)
        self.base_weight.forget(adapter_name)

    @property
    def base_weight(self) -> BaseWeight:
        """The base weight, and what is kept of it."""
        return BaseWeight(self._untouched, self._weight_version, self._kept)

    def _untouched(self) -> Tensor:  # (out, in)
        """Return the base weight as it was before any merge."""
        if self._unmerged is None:
            with align_module_device(self.get_base_layer()):
                W = self.get_base_weight()
        elif self.quantization_backend is not None:
            W = self.quantization_backend.get_base_weight(self._unmerged)
        else:
            W = self._unmerged
        return W.T if self.fan_in_fan_out else W

    @property
    def home(self) -> torch.device:
        """Where the base weight is; the meta device while it is offloaded."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device or torch.device("cpu")

    def _weight_version(self) -> object:
        """Return what differs once the base weight has moved, changed its type or been written to."""
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is None or weight.is_meta:
            return None
        return weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _, before = self._get_base_layer_device_and_dtype(self.get_base_layer())
        super()._apply(fn, recurse)
        _, after = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.base_weight.moved(before == after, self.home)
        return self

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the adapted output; row `i` of a batch uses `adapter_names[i]` when names are given."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        active = [adapter for adapter in self.active_adapters if adapter in self.lotr_site]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1:
            return self._adapted(active[0], x, *args, **kwargs)
        base = self.base_layer(x, *args, **kwargs)
        result = base
        for adapter in active:  # what each would change alone adds up
            if self.lotr_site[adapter].magnitude.additive:
                result = result + self.adapted(adapter).update(x)
            else:
                result = result + (self._adapted(adapter, x, *args, base=base, **kwargs) - base)
        return result.to(base.dtype)

    def _adapted(
        self, adapter: str, x: Tensor, *args: Any, base: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the output with one adapter alone; `base` is that of the base layer where it is known."""
        adapted = self.adapted(adapter)
        bias = getattr(self.get_base_layer(), "bias", None)
        alone = base is None and not args and not kwargs
        if alone and adapted.magnitude.scales_outputs and direct.fits(adapted, x):
            summed = direct.output(adapted, x)  # before the gains, whose norms may use its products
            return adapted.gains().of_sum(summed, bias).to(summed.dtype)
        gains = None if adapted.magnitude.additive else adapted.gains()
        if gains is not None and gains.input is not None:
            x, base = (x * gains.input).to(x.dtype), None
        y: Tensor | None = None
        if alone and (gains is None or gains.alike):
            y = direct.output(adapted, x) if direct.fits(adapted, x) else direct.output_in_graph(adapted, x)
        if y is not None:
            return y if gains is None else gains.of_sum(y, bias).to(y.dtype)
        if base is None:
            base = direct.in_graph(self, x) if not args and not kwargs else None
        if base is None:
            base = self.base_layer(x, *args, **kwargs)
        update = adapted.update(x)
        if gains is None:
            return (base + update).to(base.dtype)
        return gains.output(base, bias, update).to(base.dtype)

    def _mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
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
        base = self.base_layer(x, *args, **kwargs)
        result = base.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter not in self.lotr_site:  # "__base__", or an adapter that does not touch this module
                continue
            rows = torch.tensor(
                [i for i, name in enumerate(adapter_names) if name == adapter], device=x.device
            )
            result[rows] = self._adapted(adapter, x[rows], *args, base=base[rows], **kwargs)
        return result

    # ------------------------------------------------------------------ merge

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter changes, in the layout of the base weight.

        That is `ΔW`, or `W' - W` with a magnitude; `(out, in)`, or `(in, out)` for `Conv1D`.
        """
        adapted = self.adapted(adapter)
        parts = [adapted.placed(member) for member in adapted.members]
        dW = parts[0].update.dense()
        if dW.shape != (self.out_features, self.in_features):
            dW = dW.new_zeros(self.out_features, self.in_features)
            for part in parts:
                dW[part.rows, part.columns] = part.update.dense()
        if not adapted.magnitude.additive:
            W = self._untouched().to(dW)
            dW = adapted.gains().weight(W, dW) - W
        dtype = adapted.members[0].group.lotr_U[adapter].weight.dtype
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
            if adapter not in self.lotr_site:
                continue
            W = self.get_base_weight()
            dW = self.get_delta_weight(adapter).to(W.device)
            exact = torch.promote_types(W.dtype, dW.dtype)
            merged = (W.to(exact) + dW.to(exact)).to(W.dtype)
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
        for state in self.lotr_site.values():  # a forward pass with adapters disabled unmerges layers alone
            for member in state.members:
                member.group.unmerge()
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


def base_weight(module: nn.Module) -> Tensor:  # (out, in)
    """Return the weight of a linear module, adapted or not, dequantised."""
    if isinstance(module, LotrLinear):
        return module._untouched()
    backend = resolve_quantization_backend(module)
    with align_module_device(module):
        weight: Any = module.weight.data if backend is None else backend.get_base_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight
