"""Experts that a model keeps in one parameter: what stands for such a weight, and the module around them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError, TrainingError
from ..math.stacked_weight import StackedWeight, StackUpdate
from ..math.update import scaled
from ..sharing.keys import BASIS
from ..sharing.paths import normalise
from .batch_cores import Rows, RowsOfCall
from .weight import AdaptedWeight


class ExpertsWeight:
    """One parameter `(experts, out, in)` of an experts module, in the place of a linear module.

    Not a module itself, so the parameter stays where the model has it. With `fan_in_fan_out` it is stored
    `(experts, in, out)`.
    """

    bias = None

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.fan_in_fan_out = bool(getattr(module, "is_transposed", False))

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, in the layout of the model."""
        return self.module.get_parameter(self.name)

    @weight.setter
    def weight(self, weight: nn.Parameter) -> None:
        setattr(self.module, self.name, weight)


class LotrExperts(nn.Module):
    """An experts module whose parameters have updates; each child holds those of the parameter of its name.

    The module reads its parameters itself, so it runs with `W + ΔW` in their place: in factored form, or under a
    compiler as a sum. Where rows of the batch have tasks, it runs as if every expert was there once for each row: the
    number by which the model sends a token to an expert tells its row too.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the experts with the active adapters, or with the task of each row.

        Raises:
            TrainingError: DeepSpeed has cut the parameters into parts.
            ConfigError: Rows have tasks, and it cannot be told which token is whose.
        """
        parameters = self.base_layer.parameters(recurse=False)
        if torch.is_grad_enabled() and any(hasattr(parameter, "ds_id") for parameter in parameters):
            raise TrainingError(
                "Adapters on experts that one parameter holds cannot train under ZeRO-3, which takes factors away "
                "before the backward pass needs them. Use ZeRO-2 or FSDP2, or leave the experts out with "
                "exclude_modules."
            )
        weights = {name: weight for name, weight in self.adapted_weights() if _active(weight)}
        of_bank = next((of_bank for weight in weights.values() for of_bank in _banks(weight)), None)
        rows = None if of_bank is None else of_bank.get()
        if of_bank is not None and rows is not None:
            return self._by_row(rows, of_bank.take_batch(), weights, *args, **kwargs)
        if not weights:
            return self.base_layer(*args, **kwargs)
        changed = {name: _adapted(weight) for name, weight in weights.items()}
        if torch.compiler.is_compiling() or _is_wrapped(self.base_layer):
            return functional_call(self.base_layer, changed, args, kwargs)
        return _twin(self.base_layer, changed)(*args, **kwargs)

    def _by_row(
        self,
        rows: Rows,
        batch: tuple[int, int] | None,
        weights: Mapping[str, AdaptedWeight],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run every token with the task of its row; the tokens must be those of the batch, row after row."""
        base, n = self.base_layer, rows.count
        experts = next(iter(weights.values())).experts
        called: Any = args if len(args) == 3 and not kwargs else (None, None, None)
        x, index, shares = called
        # the models of transformers view a batch as tokens, row after row; of others nothing is known
        if not (
            type(base).__module__.startswith("transformers.models.")
            and isinstance(index, Tensor)
            and not index.dtype.is_floating_point
            and (x.dim(), index.dim()) == (2, 2)
            and isinstance(shares, Tensor)
            and len(x) == len(index)
            and shares.shape == index.shape
            and getattr(base, "num_experts", None) == experts
            and not torch.compiler.is_compiling()
            and not _is_wrapped(base)
        ):
            raise ConfigError(
                f"Rows of a batch cannot have tasks of their own on the experts of {type(base).__name__}: it is none "
                "of transformers' models, or not called with tokens, the numbers of their experts and their shares, or "
                "is compiled, or runs inside a hook of accelerate. Run a batch for each task, or leave the experts out."
            )
        if batch is None or batch[0] * batch[1] != len(x):
            raise ConfigError(
                f"Rows of a batch cannot have tasks of their own on the experts of {type(base).__name__}: they see "
                f"{len(x)} tokens of a batch of shape {batch}, so it cannot be told which is whose. Run a batch for "
                "each task, or leave the experts out."
            )
        if batch[0] % n:
            raise ConfigError(
                f"Every row of a batch needs a task: tasks are selected for {n} rows, and the batch has {batch[0]}. "
                "Name one task a row, None for the base model."
            )
        row = torch.arange(len(x), device=index.device) // (len(x) // n)
        # a number beyond the experts says that a token has none
        index = (index * n + row.unsqueeze(-1)).clamp_max(experts * n)
        routed = index.flatten().sort().values
        copies = {}
        for name, parameter in base.named_parameters(recurse=False):
            updates = _updates(weights[name], rows) if name in weights else ()
            copies[name] = StackedWeight.of(parameter, updates, n, routed)
        twin = _twin(base, copies)
        twin.num_experts = experts * n  # type: ignore[assignment]
        return twin(x, index, shares)

    def adapted_weights(self) -> Iterator[tuple[str, AdaptedWeight]]:
        """Yield name and updates of every adapted parameter."""
        for name, child in self.named_children():
            if isinstance(child, AdaptedWeight):
                yield name, child

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the plain experts; PEFT calls this where a tuner layer wraps more than one weight."""
        if merge:
            for _, weight in self.adapted_weights():
                weight.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def _is_wrapped(module: nn.Module) -> bool:
    """Whether something that knows the module itself runs in place of its class's forward pass."""
    return "forward" in vars(module)


def _twin(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that shares all with another but some parameters.

    Put into the module itself, even for a moment, they would be seen by calls of other threads.
    """
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
    return twin


def _active(weight: AdaptedWeight) -> list[str]:
    """Return the adapters that a forward pass adds; with adapters disabled it unmerges, as PEFT's layers do."""
    if weight.disable_adapters:
        if weight.merged:
            weight.unmerge()
        return []
    return [adapter for adapter in weight.active_adapters if adapter in weight.adapters and not weight.merged]


def _banks(weight: AdaptedWeight) -> Iterator[RowsOfCall]:
    """Yield what the active adapters of banks look at for the rows of a call."""
    for adapter in _active(weight):
        of_bank = weight.adapters[adapter].parts[0][1].rows.get(adapter)
        if of_bank is not None:
            yield of_bank


def _adapted(weight: AdaptedWeight) -> Tensor:
    """Return `W + ΔW` in the layout of the model."""
    W: Any = weight.get_base_layer().weight
    if not torch.compiler.is_compiling():
        return StackedWeight.of(W, _updates(weight))
    for adapter in _active(weight):
        W = weight.plus(W, weight.delta(adapter))
    return W


def _updates(weight: AdaptedWeight, rows: Rows | None = None) -> list[StackUpdate]:
    """Return the updates of the active adapters; with rows, every expert has the core of each in a run."""
    return [_update(weight, adapter, rows) for adapter in _active(weight)]


def _update(weight: AdaptedWeight, adapter: str, rows: Rows | None) -> StackUpdate:
    parts = weight.adapters[adapter].parts
    own = sorted(zip(weight.factored(adapter), parts, strict=True), key=lambda pair: pair[0].first_row)
    cores = []
    for update, (part, group) in own:  # one for all experts, or one an expert
        of_bank = rows is not None and adapter in group.rows
        C = rows.cores(part, group.shared_numbers(adapter)).to(update.C) if rows and of_bank else update.C
        C = scaled(C, update.scaling).unflatten(-2, (update.grid[0], -1))  # (*rows, experts, k, r)
        if rows is not None:
            C = C.transpose(0, 1).flatten(0, 1) if of_bank else C.repeat_interleave(rows.count, 0)
        cores.append(C)
    first = own[0][0]
    left, right = first.U, first.V.T
    if len(own) > 1:
        left, right = (torch.stack(side) for side in zip(*((u.U, u.V.T) for u, _ in own), strict=True))
    return StackUpdate(left, torch.cat(cores), right, weight.fan_in_fan_out)


def stacked_weights(model: nn.Module) -> dict[str, tuple[str, ExpertsWeight]]:
    """Return the three-dimensional parameters of a model, adapted or not.

    Returns:
        Path of the parameter, without wrappers' names → path of its module in the model, and the parameter.
    """
    weights, inside = {}, set()
    for path, module in model.named_modules():
        base: Any = module
        if isinstance(module, LotrExperts):
            base = module.base_layer
            inside.add(base)
        elif module in inside or BASIS in path.split("."):
            continue
        for name, parameter in base.named_parameters(recurse=False):
            if parameter.dim() == 3:
                weights[normalise(f"{path}.{name}")] = (path, ExpertsWeight(base, name))
    return weights


def is_plain_stack(weight: ExpertsWeight) -> bool:
    """Whether a stack of experts holds ordinary numbers in memory, or on the meta device of a plan."""
    parameter = weight.weight
    offloaded = parameter.is_meta and hasattr(weight.module, "_hf_hook")
    plain = parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return plain and not offloaded
