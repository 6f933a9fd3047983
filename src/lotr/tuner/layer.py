"""The adapted module, as a PEFT layer: what it computes. `weight.py` has what it holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..math import update as formula
from ..math.dropout import Dropout
from ..math.fused_linear import adapted_linear
from ..math.matmul import runs_op_by_op
from ..math.update import LinearMap
from ..sharing.groups import Part
from .group import LotrGroup, SiteCores, call, call_transposed, is_plain
from .weight import AdaptedWeight

_NOTHING_DROPS = Dropout()


class LotrLinear(AdaptedWeight):
    """A linear module with updates: as one function of autograd, module by module, or by the cores of a batch."""

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the adapted output; row `i` of a batch uses `adapter_names[i]` when names are given."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        active = [adapter for adapter in self.active_adapters if adapter in self.adapters]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1:
            return self._adapted(active[0], x, None, *args, **kwargs)
        base = self.base_layer(x, *args, **kwargs)
        result = base
        for adapter in active:  # what each would change alone adds up
            if self.adapters[adapter].magnitude.additive:
                result = result + self.update(adapter, x)
            else:
                result = result + (self._adapted(adapter, x, base, *args, **kwargs) - base)
        return result.to(base.dtype)

    def _adapted(self, adapter: str, x: Tensor, base: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output with one adapter alone; `base` is that of the base layer where it is known."""
        bias = getattr(self.get_base_layer(), "bias", None)
        gains = None if self.adapters[adapter].magnitude.additive else self.gains(adapter)
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
        # without gradients a weight that trains is as good as frozen; under FSDP frozen ones say that they train, too
        trains = base.weight.requires_grad and torch.is_grad_enabled()
        if trains or not is_plain(base, dtype, x.device) or not runs_op_by_op():
            return False
        own = self.adapters[adapter]
        if (x.dtype != dtype and _autocast_type(x) is None) or (own.dropout.rate and self.training):
            return False
        for part, group in own.parts:
            if adapter in group.rows or part.grid[1] > 1 or part.columns[1] != self.in_features:
                return False
            factors = (group.lotr_U[adapter], group.lotr_V[adapter])
            if not all(type(m) is nn.Linear and is_plain(m, dtype, x.device) for m in factors):
                return False
            if part.group.core.by_site:
                cores = self.lotr_C[adapter]
                if type(cores) is not SiteCores or not is_plain(cores, dtype, x.device, part.name):
                    return False
        return True

    def _fused(self, adapter: str, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
        """Return base plus update by one function of autograd."""
        W, bias = self.base_layer.weight, self.base_layer.bias
        dtype = _autocast_type(x) or W.dtype
        W = (W.T if self.fan_in_fan_out else W).to(dtype)
        update = self.bias_update(adapter)
        bias = bias if update is None else bias + update.to(bias)
        updates = self.factored(adapter, x.device, dtype)
        return adapted_linear(x.to(dtype), W, None if bias is None else bias.to(dtype), updates)

    def update(self, adapter: str, x: Tensor) -> Tensor:  # (*n, in) -> (*n, out)
        """Return the update of the output, before the magnitude, by calling the adapter's modules."""
        own = self.adapters[adapter]
        x = self._cast_input_dtype(x, self.dtype(adapter))
        drop = own.dropout if self.training else _NOTHING_DROPS
        if drop.at("update"):
            if any(adapter in group.rows for _, group in own.parts):
                raise ConfigError(
                    "dropout_place='update' drops numbers of one ΔW, and the rows of a bank's batch have one each. "
                    "Train on a basis whose adapter has another place, or no dropout."
                )
            return self._with_bias(adapter, F.linear(x, drop("update", self.dense(adapter)).to(x.dtype)))
        x = drop("input", x)
        outputs: dict[int, Tensor] = {}  # first row → the sum of what covers those rows
        for part, group in own.parts:
            first, width = part.columns
            output = formula.apply(
                x if width == self.in_features else x.narrow(-1, first, width),
                partial(_input, part, group, adapter),
                self._core_map(adapter, part, group, drop),
                partial(_output, part, group, adapter),
                self.scaling[adapter] * part.gain,
                part.grid,
            )
            row = part.rows[0]
            outputs[row] = outputs[row] + output if row in outputs else output
        blocks = [outputs[row] for row in sorted(outputs)]
        return self._with_bias(adapter, blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1))

    def _with_bias(self, adapter: str, y: Tensor) -> Tensor:  # (*n, out)
        """Add what the adapter, or the task of each row, adds to the bias."""
        of_bank = self.adapters[adapter].parts[0][1].rows.get(adapter)
        rows = None if of_bank is None else of_bank.get()
        bias = self.bias_update(adapter, rows)
        if bias is None or rows is None:
            return y if bias is None else y + bias.to(y)
        bias = bias.to(y).reshape(len(bias), *[1] * (y.dim() - 1), -1)
        return (y.unflatten(0, (len(bias), -1)) + bias).flatten(0, 1)  # every row may come several times

    def _core_map(self, adapter: str, part: Part, group: LotrGroup, drop: Dropout) -> LinearMap:
        of_bank, core, rate = group.rows.get(adapter), part.group.core, drop.at("components")
        batch = None if of_bank is None else of_bank.get()  # cores of a task for each row of this call
        multiply: LinearMap
        if batch is not None:
            multiply = batch.core(part, group.shared_numbers(adapter), rate)
        elif core.is_identity:
            multiply = _unchanged
        elif core.by_site:
            multiply = partial(self.lotr_C[adapter], name=part.name)
        else:
            multiply = partial(_times, self.core(adapter, part, group, rate))
        return (lambda h: drop("core_output", multiply(h))) if drop.at("core_output") else multiply

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
            if adapter not in self.adapters:  # "__base__", or an adapter that does not touch this module
                continue
            rows = torch.tensor(
                [i for i, name in enumerate(adapter_names) if name == adapter], device=x.device
            )
            result[rows] = self._adapted(adapter, x[rows], base[rows], *args, **kwargs)
        return result

    def __repr__(self) -> str:
        return "lotr." + super().__repr__()


def _unchanged(h: Tensor) -> Tensor:
    return h


def _times(C: Tensor, h: Tensor) -> Tensor:  # (a·k, b·r), (*n, b·r) -> (*n, a·k)
    return F.linear(h, C.to(h.device))


def _input(part: Part, group: LotrGroup, adapter: str, x: Tensor) -> Tensor:  # (*n, m) -> (*n, r)
    """Multiply by the first factor of a part; a narrower site is padded to the rows of the factor."""
    if part.transposed:
        return call_transposed(group.lotr_U[adapter], x)
    missing = part.group.shape[1] - part.block[1]
    return call(group.lotr_V[adapter], F.pad(x, (0, missing)) if missing else x)


def _output(part: Part, group: LotrGroup, adapter: str, h: Tensor) -> Tensor:  # (*n, k) -> (*n, n)
    """Multiply by the second factor of a part; a narrower site takes the first rows."""
    if part.transposed:
        return call_transposed(group.lotr_V[adapter], h)
    y, rows = call(group.lotr_U[adapter], h), part.block[0]
    return y if rows == part.group.shape[0] else y[..., :rows]


def _autocast_type(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    applies = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves alone
    return torch.get_autocast_dtype(device) if applies else None
