"""The adapted module, as a PEFT layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..math import update as formula
from ..math.fused_linear import adapted_linear
from ..math.magnitude import MAGNITUDES, Gains, Magnitude
from ..math.matmul import runs_op_by_op
from ..math.norms import BaseWeight
from ..math.update import FactoredUpdate, LinearMap
from ..sharing.blocks import Shape
from ..sharing.plan import Part
from .config import LotrConfig
from .group import LotrGroup, LotrLayer, NamedNumbers, call, is_plain, linear_from, move, weight_of


class LotrLinear(nn.Module, LotrLayer):
    """A linear module (`Linear`, `Conv1D` or a quantised linear) with updates in factored form.

    `lotr_C[adapter].weight` holds the cores that belong to the module's sites, side by side as their blocks are,
    shape `(a·k, b·r)`; `lotr_C[adapter][part]` where the module has parts in several groups.
    `lotr_magnitude[adapter]` has the numbers of the magnitude.
    """

    adapter_layer_names = ("lotr_C", "lotr_magnitude")
    other_param_names = ("parts", "scaling", "magnitude", "dropout", "norm_gradient")
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
        # adapter → its parts here, with their groups; plain, because groups are registered once, on the model's root
        self.parts: dict[str, tuple[tuple[Part, LotrGroup], ...]] = {}
        self.scaling = scaling  # one dictionary for the whole model, see LotrGroup
        self.magnitude: dict[str, Magnitude] = {}
        self.dropout: dict[str, float] = {}
        self.norm_gradient: dict[str, bool] = {}
        self._norms: dict[str, Tensor] = {}  # of the base weight
        self.register_load_state_dict_post_hook(_forget_norms)
        self.merged_adapters: list[str] = []
        self._unmerged: Any = None

    def add(
        self,
        adapter: str,
        parts: Sequence[tuple[Part, LotrGroup]],
        cores: Mapping[str, Tensor],  # part's name -> (a·k, b·r)
        config: LotrConfig,
        empty: bool,
    ) -> None:
        """Add an adapter: the parts of the module, and the cores that are kept with it."""
        if cores:
            self.lotr_C[adapter] = linear_from(cores[""]) if "" in cores else NamedNumbers(cores)
        magnitude = MAGNITUDES[str(config.magnitude)]
        self.parts[adapter], self.magnitude[adapter] = tuple(parts), magnitude
        self.dropout[adapter], self.norm_gradient[adapter] = config.dropout, config.norm_gradient
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
            W = self.quantization_backend.get_base_weight(self._unmerged)
        else:
            W = self._unmerged
        return W.T if self.fan_in_fan_out else W

    @property
    def home(self) -> torch.device:
        """Where the base weight is; the meta device while it is offloaded."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device or torch.device("cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _, before = self._get_base_layer_device_and_dtype(self.get_base_layer())
        super()._apply(fn, recurse)
        _, after = self._get_base_layer_device_and_dtype(self.get_base_layer())
        # computed anew on another device, a norm could differ in its last bit from the magnitude that started at it
        norms = {name: norm.to(self.home) for name, norm in self._norms.items()} if before == after else {}
        self._norms.clear()
        self._norms.update(norms)
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
        active = [adapter for adapter in self.active_adapters if adapter in self.parts]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1:
            return self._adapted(active[0], x, None, *args, **kwargs)
        base = self.base_layer(x, *args, **kwargs)
        result = base
        for adapter in active:  # what each would change alone adds up
            if self.magnitude[adapter].additive:
                result = result + self.update(adapter, x)
            else:
                result = result + (self._adapted(adapter, x, base, *args, **kwargs) - base)
        return result.to(base.dtype)

    def _adapted(self, adapter: str, x: Tensor, base: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output with one adapter alone; `base` is that of the base layer where it is known."""
        bias = getattr(self.get_base_layer(), "bias", None)
        gains = None if self.magnitude[adapter].additive else self.gains(adapter)
        if gains is not None and gains.input is not None:
            x, base = (x * gains.input).to(x.dtype), None
        fused = base is None and not args and not kwargs and (gains is None or gains.alike)
        if fused and self._has_plain_tensors(adapter, x):
            y = self._fused(adapter, x)
            return y if gains is None else gains.of_sum(y, bias).to(y.dtype)
        if base is None:
            base = self.base_layer(x, *args, **kwargs)
        update = self.update(adapter, x)
        adapted = base + update if gains is None else gains.output(base, bias, update)
        return adapted.to(base.dtype)

    def _has_plain_tensors(self, adapter: str, x: Tensor) -> bool:
        """Whether the fused function computes what calling the modules would, and every part reads the whole input."""
        base = self.base_layer
        if type(base) not in (nn.Linear, Conv1D) or type(x) not in (Tensor, nn.Parameter) or x.is_nested:
            return False
        dtype = base.weight.dtype
        if base.weight.requires_grad or not is_plain(base, dtype, x.device) or not runs_op_by_op():
            return False
        if (x.dtype != dtype and _autocast_type(x) is None) or (self.dropout[adapter] and self.training):
            return False
        for part, group in self.parts[adapter]:
            if adapter in group.rows or part.grid[1] > 1 or part.columns[1] != self.in_features:
                return False
            modules = [group.lotr_U[adapter], group.lotr_V[adapter]]
            if part.group.core.by_site and not part.name:
                modules.append(self.lotr_C[adapter])
            if not all(type(m) is nn.Linear and is_plain(m, dtype, x.device) for m in modules):
                return False
        return True

    def _fused(self, adapter: str, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
        """Return base plus update by one function of autograd."""
        W, bias = self.base_layer.weight, self.base_layer.bias
        dtype = _autocast_type(x) or W.dtype
        W = (W.T if self.fan_in_fan_out else W).to(dtype)
        updates = self.factored(adapter, x.device, dtype)
        return adapted_linear(x.to(dtype), W, None if bias is None else bias.to(dtype), updates)

    def update(self, adapter: str, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
        """Return the update of the output, before the magnitude, by calling the adapter's modules."""
        x = self._cast_input_dtype(x, self.parts[adapter][0][1].lotr_V[adapter].weight.dtype)
        dropout = self.dropout[adapter]
        x = F.dropout(x, dropout, self.training) if dropout else x
        outputs: dict[int, Tensor] = {}  # first row → the sum of what covers those rows
        for part, group in self.parts[adapter]:
            first, width = part.columns
            of_bank = group.rows.get(adapter)
            batch = None if of_bank is None else of_bank.get()  # cores of a task for each row of this call
            output = formula.apply(
                x if width == self.in_features else x.narrow(-1, first, width),
                partial(call, group.lotr_V[adapter]),
                self._core_map(adapter, part, group) if batch is None else batch.core(part),
                partial(call, group.lotr_U[adapter]),
                self.scaling[adapter],
                part.grid,
            )
            row = part.rows[0]
            outputs[row] = outputs[row] + output if row in outputs else output
        blocks = [outputs[row] for row in sorted(outputs)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)

    def _core_map(self, adapter: str, part: Part, group: LotrGroup) -> LinearMap:
        if part.group.core.is_identity:
            return lambda h: h
        if part.group.core.by_site and not part.name:
            module: LinearMap = self.lotr_C[adapter]
            return module
        C = self.core(adapter, part, group)
        return lambda h: F.linear(h, C.to(h.device))

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
            if adapter not in self.parts:  # "__base__", or an adapter that does not touch this module
                continue
            rows = torch.tensor(
                [i for i, name in enumerate(adapter_names) if name == adapter], device=x.device
            )
            result[rows] = self._adapted(adapter, x[rows], base[rows], *args, **kwargs)
        return result

    # ------------------------------------------------------------------ the adapter's tensors

    def core(self, adapter: str, part: Part, group: LotrGroup) -> Tensor:  # (a·k, b·r)
        """Return the cores of a part, side by side."""
        core = part.group.core
        if core.by_site:
            return self.site_core(adapter, part)
        if core.is_identity:
            U = group.lotr_U[adapter].weight
            return torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        numbers = group.lotr_core[adapter]()
        # autocast would turn some of these small products to another type, and not others
        with _without_autocast(next(iter(numbers.values())).device):
            return formula.side_by_side(core.block(numbers, part.region), part.grid)

    def site_core(self, adapter: str, part: Part) -> Tensor:  # (a·k, b·r)
        """Return the cores of a part that are kept with the layer."""
        module = self.lotr_C[adapter]
        return module()[part.name] if part.name else weight_of(module)

    def factored(
        self, adapter: str, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[FactoredUpdate]:
        """Return the parts of the update with their tensors.

        Args:
            adapter: Name of the adapter.
            device: Default: where the base weight is; with an offloaded base, where the factors are.
            dtype: Default: float32, or float64 where the factors have it.
        """
        updates = []
        for part, group in self.parts[adapter]:
            U, Vt = weight_of(group.lotr_U[adapter]), weight_of(group.lotr_V[adapter])
            home = device or (U.device if self.home.type == "meta" else self.home)
            width = dtype or (torch.float64 if U.dtype == torch.float64 else torch.float32)
            U, C, Vt = (tensor.to(home, width) for tensor in (U, self.core(adapter, part, group), Vt))
            position = part.rows[0], part.columns[0]
            updates.append(FactoredUpdate(U, C, Vt.T, self.scaling[adapter], part.grid, *position))
        return updates

    def gains(self, adapter: str) -> Gains:
        """Return what the magnitude does, from the factors as they are now."""
        numbers = self.lotr_magnitude[adapter]()
        # norms in half precision would be coarse
        with _without_autocast(next(iter(numbers.values())).device):
            updates, constant = self.factored(adapter), not self.norm_gradient[adapter]
            return self.magnitude[adapter].gains(numbers, self.base_weight, updates, constant)

    # ------------------------------------------------------------------ merge

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what the adapter changes, in the layout of the base weight.

        That is `ΔW`, or `W' - W` with a magnitude; `(out, in)`, or `(in, out)` for `Conv1D`.
        """
        updates = self.factored(adapter)
        dW = updates[0].dense()
        if dW.shape != (self.out_features, self.in_features):
            dW = dW.new_zeros(self.out_features, self.in_features)
            for update in updates:
                dW[update.rows, update.columns] = update.dense()
        if not self.magnitude[adapter].additive:
            W = self._untouched().to(dW)
            dW = self.gains(adapter).weight(W, dW) - W
        dtype = self.parts[adapter][0][1].lotr_U[adapter].weight.dtype
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
            if adapter not in self.parts:
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
                self._unmerged = self._copy_of_base()
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)
            self._norms.clear()

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters = []
        for parts in self.parts.values():  # a forward pass with adapters disabled unmerges layers alone
            for _, group in parts:
                group.unmerge()
        if self._unmerged is None:
            return
        if self.quantization_backend is not None:
            self.base_layer = self._unmerged
        else:
            weight = self.get_base_layer().weight
            weight.data = self._unmerged.to(device=weight.device, dtype=weight.dtype)
        self._unmerged = None

    def _copy_of_base(self) -> Any:
        # quantising again would not give the same numbers, so the whole (small) quantised layer is kept;
        # of a plain weight the tensor itself, because merging puts a new one in its place
        quantised = self.quantization_backend is not None
        return copy.deepcopy(self.base_layer) if quantised else self.get_base_weight()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is `W + ΔW`, so that plain LoRA can hold it."""
        return adapter_name in self.magnitude and self.magnitude[adapter_name].additive

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


def _forget_norms(layer: LotrLinear, keys: object) -> None:
    layer._norms.clear()


def _autocast_type(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    applies = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if applies else None


def _without_autocast(device: torch.device) -> Any:
    # there is no autocast on the meta device
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
