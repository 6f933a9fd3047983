"""The weight of an adapted module: the frozen one, what each adapter adds, and merging."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..math.dropout import Dropout
from ..math.magnitude import MAGNITUDES, Gains, Magnitude
from ..math.norms import BaseWeight
from ..math.update import FactoredUpdate
from ..sharing.blocks import Shape
from ..sharing.groups import Part, bias_of
from .batch_cores import Rows
from .config import LotrConfig
from .group import LotrGroup, LotrLayer, NamedNumbers, SiteCores, move, weight_of
from .quantised import backend_of, check_can_merge


@dataclass(frozen=True)
class AdapterOfWeight:
    """What a weight has of one adapter, beside numbers: its parts with their groups, and settings of the adapter."""

    parts: tuple[tuple[Part, LotrGroup], ...]
    magnitude: Magnitude
    dropout: Dropout
    norm_gradient: bool


class AdaptedWeight(nn.Module, LotrLayer):
    """The weight of a `Linear`, a `Conv1D`, a quantised linear or a stack of experts, with updates in factored form.

    A stack of experts `(experts, out, in)` is one matrix `(experts · out, in)` here.

    `lotr_C[adapter].weight` holds the cores that belong to the module's sites, side by side as their blocks are,
    shape `(a·k, b·r)`; of a module with several parts, each is called like its part. `lotr_magnitude[adapter]` has the
    numbers of the magnitude.
    """

    adapter_layer_names = ("lotr_C", "lotr_magnitude")
    other_param_names = ("adapters", "scaling")
    # torch knows no better type of what a module holds than `Tensor | Module`
    base_layer: Any
    lotr_C: Any
    lotr_magnitude: Any
    _active_adapter: Any

    def __init__(
        self,
        base_layer: Any,
        shape: Shape,
        scaling: dict[str, float],
        experts: int = 0,
        **quantization: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape
        self.experts = experts
        self.fan_in_fan_out = _is_transposed(self.get_base_layer())
        self.quantization_backend = backend_of(self.get_base_layer(), **quantization)
        self.lotr_C = nn.ModuleDict()
        self.lotr_magnitude = nn.ModuleDict()
        # plain, because groups are registered once, on the model's root
        self.adapters: dict[str, AdapterOfWeight] = {}
        self.scaling = scaling  # one dictionary for the whole model, see LotrGroup
        self._norms: dict[str, Tensor] = {}  # of the base weight
        self.register_load_state_dict_post_hook(_forget_norms)
        self.merged_adapters: list[str] = []
        # what was untouched, while something is merged: the weight (the layer, if it is quantised) and the bias; in a
        # tuple, which keeps them out of the state dict
        self._unmerged: tuple[Any, Tensor | None] | None = None

    def add(
        self,
        adapter: str,
        parts: Sequence[tuple[Part, LotrGroup]],
        cores: Mapping[str, Tensor],  # (a·k, b·r) each, by name
        config: LotrConfig,
        empty: bool,
    ) -> None:
        """Add an adapter: the parts of the module, and the cores that are kept with it."""
        if cores:
            self.lotr_C[adapter] = SiteCores(cores)
        magnitude = MAGNITUDES[str(config.magnitude)]
        self.adapters[adapter] = AdapterOfWeight(
            tuple(parts), magnitude, Dropout(config.dropout, config.dropout_place), config.norm_gradient
        )
        self.scaling[adapter] = config.scaling
        shapes = magnitude.shapes(self.out_features, self.in_features)
        if shapes:
            numbers = (
                {n: torch.empty(s) for n, s in shapes.items()} if empty else magnitude.init(self.base_weight)
            )
            self.lotr_magnitude[adapter] = NamedNumbers(numbers)
        self._move_adapter_to_device_of_base_layer(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        home, dtype = self.device_and_dtype()
        # a magnitude stays in float32 on a half-precision base too: a rounded norm would change the base model
        for numbers, own_type in ((self.lotr_C, dtype), (self.lotr_magnitude, None)):
            if adapter_name in numbers:
                move(numbers[adapter_name], device or home, own_type)

    def device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Return where an adapter of the module lives, and in which type it starts.

        An offloaded weight is on the meta device until its module is called. Numbers that followed it there would be
        lost, so they live where the module runs.
        """
        base = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(base)
        hook = getattr(base, "_hf_hook", None)
        if device is not None and device.type == "meta" and hook is not None:
            runs_on = getattr(hook, "execution_device", None)
            device = torch.device("cpu" if runs_on is None else runs_on)
        return device, dtype

    @property
    def base_weight(self) -> BaseWeight:
        """The base weight, with its norms; whoever writes to the weight calls `base_weight.cache.clear()`."""
        return BaseWeight(self._untouched, self._norms)

    def _untouched(self) -> Tensor:  # (out, in)
        """Return the base weight as it was before any merge."""
        if self._unmerged is None:
            with align_module_device(self.get_base_layer()):
                W = self.get_base_weight()
        elif self.quantization_backend is not None:
            W = self.quantization_backend.get_base_weight(self._unmerged[0])
        else:
            W = self._unmerged[0].data
        return _as_matrix(W, self.fan_in_fan_out)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _, before = self._home
        super()._apply(fn, recurse)
        for untouched in self._unmerged or ():
            if isinstance(untouched, nn.Module):
                untouched._apply(fn)
            elif untouched is not None:
                untouched.data = fn(untouched.data)
        device, after = self._home
        # computed anew on another device, a norm could differ in its last bit from the magnitude that started at it
        norms = {name: norm.to(device) for name, norm in self._norms.items()} if before == after else {}
        self._norms.clear()
        self._norms.update(norms)
        return self

    @property
    def _home(self) -> tuple[torch.device, torch.dtype | None]:
        """Device (meta while it is offloaded) and type of the base weight."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device or torch.device("cpu"), dtype

    def dtype(self, adapter: str) -> torch.dtype:
        """Return the type of an adapter's factors."""
        dtype: torch.dtype = self.adapters[adapter].parts[0][1].lotr_U[adapter].weight.dtype
        return dtype

    def core(self, adapter: str, part: Part, group: LotrGroup, dropout: float = 0.0) -> Tensor:  # (a·k, b·r)
        """Return the cores of a part, side by side; `dropout` is the rate of dropping components."""
        core = part.group.core
        if core.by_site:
            return self.site_core(adapter, part)
        if core.is_identity:
            U = group.lotr_U[adapter].weight
            return torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        numbers: Mapping[str, Tensor] = group.core_numbers(adapter)
        # autocast would turn some of these small products to another type, and not others
        with _without_autocast(next(iter(numbers.values())).device):
            numbers = core.drop_components(numbers, dropout) if dropout else numbers
            return part.lay(core.block(numbers, part.region))

    def site_core(self, adapter: str, part: Part) -> Tensor:  # (a·k, b·r)
        """Return the cores of a part that are kept with the layer."""
        return weight_of(self.lotr_C[adapter], part.name)

    def factored(
        self, adapter: str, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[FactoredUpdate]:
        """Return the parts of the update with their tensors.

        They are where the base weight is (with an offloaded base, where the factors are), in float32, or in float64
        where the factors have it; unless another device or type is named.
        """
        updates = []
        for part, group in self.adapters[adapter].parts:
            U, Vt = weight_of(group.lotr_U[adapter]), weight_of(group.lotr_V[adapter])
            home = device or (U.device if self._home[0].type == "meta" else self._home[0])
            width = dtype or (torch.float64 if U.dtype == torch.float64 else torch.float32)
            U, C, Vt = (tensor.to(home, width) for tensor in (U, self.core(adapter, part, group), Vt))
            updates.append(part.factored(U, C, Vt.T, self.scaling[adapter]))
        return updates

    def bias_update(self, adapter: str, rows: Rows | None = None) -> Tensor | None:  # (out,), or (rows, out)
        """Return what the adapter, or each of the rows of a batch, adds to the bias; `None`: nothing."""
        parts = [
            (part, group.core_numbers(adapter) if rows is None else rows.biases(part.group))
            for part, group in self.adapters[adapter].parts
            if part.group.biases
        ]
        return bias_of(parts, self.scaling[adapter])

    def gains(self, adapter: str) -> Gains:
        """Return what the magnitude does, from the factors as they are now."""
        numbers, own = self.lotr_magnitude[adapter](), self.adapters[adapter]
        # norms in half precision would be coarse
        with _without_autocast(next(iter(numbers.values())).device):
            updates = self.factored(adapter)
            return own.magnitude.gains(numbers, self.base_weight, updates, not own.norm_gradient)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return `ΔW`, or `W' - W` with a magnitude, in the layout of the base weight: `(in, out)` for `Conv1D`."""
        return self.delta(adapter)

    def dense(self, adapter: str) -> Tensor:  # (out, in)
        """Return `ΔW`, before the magnitude."""
        with _without_autocast(self._home[0]):
            updates = self.factored(adapter)
            dW = updates[0].dense()
            if dW.shape != (self.out_features, self.in_features):
                dW = dW.new_zeros(self.out_features, self.in_features)
                for update in updates:
                    dW[update.rows, update.columns] = update.dense()
        return dW

    def delta(self, adapter: str) -> Tensor:
        """Return what `get_delta_weight` does, with a way back for gradients."""
        dW = self.dense(adapter)
        if not self.adapters[adapter].magnitude.additive:
            W = self._untouched().to(dW)
            dW = self.gains(adapter).weight(W, dW) - W
        dtype = self.dtype(adapter)
        if self.experts:
            dW = dW.unflatten(0, (self.experts, -1))
        return (dW.mT if self.fan_in_fan_out else dW).to(dtype)

    @staticmethod
    def plus(W: Tensor, dW: Tensor) -> Tensor:
        """Return `W + ΔW` in the type of `W`, added in the wider of both."""
        exact = torch.promote_types(W.dtype, dW.dtype)
        return (W.to(exact) + dW.to(exact)).to(W.dtype)

    @torch.inference_mode(False)  # in which new weights could never train again
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight and bias; what was untouched is kept, so `unmerge` is exact.

        Args:
            safe_merge: Refuse a result that is not finite, leaving the weight as it was.
            adapter_names: Default: the active adapters.

        Raises:
            ValueError: `safe_merge` found NaN or infinity.
            ConfigError: A quantised weight cannot be quantised again.
        """
        check_can_merge(self.quantization_backend)
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.adapters:
                continue
            W = self.get_base_weight()
            dW = self.get_delta_weight(adapter).to(W.device)
            merged = self.plus(W, dW)
            quantised, base = self.quantization_backend is not None, cast("Any", self.get_base_layer())
            update = self.bias_update(adapter)
            bias = None if update is None else self.plus(base.bias.data, update.data.to(W.device))
            if safe_merge and not all(t is None or torch.isfinite(t).all() for t in (merged, bias)):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"
                )
            if self._unmerged is None:
                # quantising again would not give the same numbers, so the whole (small) quantised layer is kept
                kept = copy.deepcopy(self.base_layer) if quantised else base.weight
                self._unmerged = kept, getattr(base, "bias", None)
            if quantised:
                self.set_base_weight(merged)
            else:  # another parameter in its place: embeddings that are tied to this one keep theirs
                base.weight = nn.Parameter(merged, requires_grad=bool(base.weight.requires_grad))
            if bias is not None:
                base.bias = nn.Parameter(bias, requires_grad=bool(base.bias.requires_grad))
            self.merged_adapters.append(adapter)
            self._norms.clear()

    def unmerge(self) -> None:
        """Restore the base weight and bias bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        for own in self.adapters.values():  # a forward pass with adapters disabled unmerges layers alone
            for _, group in own.parts:
                group.unmerge()
        if self._unmerged is None:
            return
        if self.quantization_backend is not None:
            self.base_layer = self._unmerged[0]
        else:
            base = self.get_base_layer()
            for name, untouched in zip(("weight", "bias"), self._unmerged, strict=True):
                if untouched is not None:
                    merged = getattr(base, name)
                    untouched.data = untouched.data.to(device=merged.device, dtype=merged.dtype)
                    setattr(base, name, untouched)
        self._unmerged = None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert the update: it is `W + ΔW` of one matrix, no bias, or there is none here."""
        own = self.adapters.get(adapter_name)
        adds = own is None or (own.magnitude.additive and self.bias_update(adapter_name) is None)
        return not self.experts and adds


def base_weight(module: Any) -> Tensor:  # (out, in)
    """Return the weight of a linear module, adapted or not, dequantised."""
    if isinstance(module, AdaptedWeight):
        return module._untouched()
    backend = backend_of(module)
    with align_module_device(module):
        weight: Any = module.weight.data if backend is None else backend.get_base_weight(module)
    return _as_matrix(weight, _is_transposed(module))


def _is_transposed(base_layer: Any) -> bool:
    """Whether a module, or what stands for a stack of experts, has its input features first."""
    return isinstance(base_layer, Conv1D) or bool(getattr(base_layer, "fan_in_fan_out", False))


def _as_matrix(weight: Tensor, transposed: bool) -> Tensor:  # (*experts, out, in) or (*experts, in, out)
    """Return a weight as `(out, in)`, experts below each other."""
    return (weight.mT if transposed else weight).flatten(0, -2)


def _forget_norms(layer: AdaptedWeight, keys: object) -> None:
    layer._norms.clear()


def _without_autocast(device: torch.device) -> Any:
    # there is no autocast on the meta device
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
