"""`lotr.init_from_data`: the factors of a fresh adapter turn towards the gradients of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ConfigError, TrainingError
from ..math.hooi import FirstStep, Subspaces
from ..math.init import generator_for
from ..sharing.groups import Part
from .factors import Parts, check_fresh, find_adapter, parts_of, set_factors
from .group import LotrGroup
from .weight import AdaptedWeight

Loss = Callable[[nn.Module, Any], Tensor]


def init_from_data(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    adapter: str | None = None,
    rounds: int = 3,
    normalise: bool = True,
    seed: int = 0,
    learning_rate: float = 1e-4,
) -> None:
    """Turn the shared factors of a fresh adapter towards gradients, without changing what the model computes.

    The factors become those that maximise `Σ_s w_s² ‖Uᵀ G_s V‖²`, where `G_s` is the gradient of the weight of site `s`
    over all batches; the cores are at zero, where `∂L/∂C_s = σ Uᵀ G_s V`. Only thin matrices are kept, never a
    gradient of a weight. Processes of `torch.distributed` add what their batches show, and get equal factors.

    Args:
        model: A model with an adapter whose update is zero.
        batches: Each as `model(**batch)` takes it: a few, gone through `rounds` times. A module that none of them
            reaches counts for nothing.
        loss: Returns the loss of a batch; default: the model's own.
        adapter: Name of the adapter; default: the active one.
        rounds: Forward and backward passes over the batches: a random one, then refinements.
        normalise: Weigh every site by one over its norm; gradients of values are often ten times those of queries.
        seed: Of the random first round.
        learning_rate: Of an adapter with `init="first_step"` alone: `η` of the step that its factors and cores take.

    Raises:
        ConfigError: There are no rounds or no batches, the update is not zero (with some magnitudes it never is), the
            cores are identities, the factors are those of a basis, or no gradient reaches the adapter (disabled,
            merged, frozen, or under `torch.no_grad()`).
        TrainingError: The loss of a batch, or a gradient, is NaN or infinite. The factors are as they were.

    With `init="first_step"` the gradients are seen whole, once: factors and cores become the leading part of the step
    `−η · sign(Σ G_s)` that AdamW would take first, and the model computes what it would after that step.

    Source: factors from gradients with a small core between them are the idea of LoRA-SB (arXiv 2411.19557); LoRA-GA
    (arXiv 2407.05000) starts LoRA from gradients, EVA (arXiv 2410.07170) from activations. Here all sites of a group
    share them.

    Example:
        >>> from peft import get_peft_model
        >>> from lotr import LotrConfig
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> model = get_peft_model(base, LotrConfig(r=2, target_modules=["0", "1"]))
        >>> init_from_data(model, [torch.randn(4, 8)], loss=lambda model, x: (model(x) - x).square().mean())
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ConfigError(
            f"rounds={rounds!r} leaves the factors as they are. Use a positive integer, for example 3."
        )
    batches = list(batches)
    if not batches:
        raise ConfigError("There are no batches to look at. Give at least one.")
    name, config = find_adapter(model, adapter)
    parts = parts_of(model, name)
    check_fresh(name, config, parts)
    _check_gradients_flow(name, parts)
    takes_step = config.init == "first_step"
    spaces: dict[LotrGroup, Subspaces | FirstStep] = {}
    for group, of_group in parts.items():
        plan = of_group[0][1].group
        generator = generator_for(seed, name, plan.name, "start")
        spaces[group] = (
            FirstStep(plan.shape, plan.rank, learning_rate)
            if takes_step
            else Subspaces(plan.shape, plan.rank, generator, normalise)
        )
    rounds = 1 if takes_step else rounds
    total = rounds * len(batches)
    with (
        _restored(model),
        tqdm(total=total, desc="Gradients", unit=" batches", delay=2, leave=False, disable=None) as bar,
    ):
        for _ in range(rounds):
            sums = {group: [_Sums(part, spaces[group]) for _, part in parts[group]] for group in parts}
            with _watched(parts, sums):
                for n, batch in enumerate(batches, 1):
                    result = (loss or _own_loss)(model, batch)
                    _check_loss(result, f"batch {n} of {len(batches)}")
                    result.backward()
                    bar.update()
            for group, of_parts in sums.items():
                _turn(spaces[group], of_parts, group.lotr_U[name].weight.device)
    for group, space in spaces.items():
        set_factors(group, name, *space.factors())
        if isinstance(space, FirstStep):
            _set_cores(name, parts[group], space.cores() / config.scaling)
    config.init = "first_step" if takes_step else "gradient"


@torch.no_grad()
def _set_cores(adapter: str, parts: list[tuple[AdaptedWeight, Part]], cores: Tensor) -> None:
    """Write cores `(sites, k, r)` over those of the parts of a group."""
    for (layer, part), own in zip(parts, cores.split([len(p.sites) for _, p in parts]), strict=True):
        layer.site_core(adapter, part).copy_(part.lay(own / part.gain))


class _Sums:
    """Sums over batches of `G_s V` `(o, q)` and `G_sᵀ U` `(i, q)` of the sites of one part."""

    def __init__(self, part: Part, space: Subspaces | FirstStep) -> None:
        self.part, self.space = part, space
        n = len(part.sites)
        self.left = space.U.new_zeros(n, len(space.U), space.V.shape[1])
        self.right = space.V.new_zeros(n, len(space.V), space.U.shape[1])

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor) -> None:  # (*n, in), (*n, out)
        """Add one batch, from the input and the gradient of the output of the module."""
        rows = (side.reshape(-1, side.shape[-1]).float() for side in (x, gradient))
        inputs, outputs = self.part.as_seen(*rows)  # (n, b, i), (n, a, o)
        U, V = self.space.U.to(x.device), self.space.V.to(x.device)
        left = torch.einsum("nao,nbq->aboq", outputs, inputs @ V).flatten(0, 1)
        right = torch.einsum("nbi,naq->abiq", inputs, outputs @ U).flatten(0, 1)
        self.left, self.right = self.left.to(x.device) + left, self.right.to(x.device) + right


def _turn(space: Subspaces | FirstStep, sums: list[_Sums], home: torch.device) -> None:
    """Turn the factors of a group by what all processes saw."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    products: list[list[Tensor]] = [[], []]
    for of_part in sums:
        for side, summed in zip(products, (of_part.left, of_part.right), strict=True):
            summed = summed.to(home)
            if together:
                torch.distributed.all_reduce(summed)
            if not summed.isfinite().all():
                raise TrainingError(
                    f"The gradient at {of_part.part.sites[0].module!r} is not finite, although every loss is; the "
                    "factors are as they were. Compute in a wider type than that of the base model, or leave out "
                    "batches."
                )
            side += summed.cpu().unbind(0)
    if not any(bool(product.any()) for product in products[0]):
        raise ConfigError(
            f"No gradient reaches {sums[0].part.sites[0].module!r}, nor any other module of its group: the adapter is "
            "frozen, or no batch goes through the modules. Load the adapter with is_trainable=True, give other "
            "batches, or leave the modules out with exclude_modules."
        )
    space.turn(*products)


@contextmanager
def _watched(parts: Parts, sums: Mapping[LotrGroup, list[_Sums]]) -> Iterator[None]:
    """Add the input and the gradient of the output of every adapted module to its sums."""
    of_layer: dict[AdaptedWeight, list[_Sums]] = {}
    for group, of_group in parts.items():
        for (layer, _), of_part in zip(of_group, sums[group], strict=True):
            of_layer.setdefault(layer, []).append(of_part)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            for of_part in of_layer[module]:  # type: ignore[index]
                of_part.add(x, gradient)

        if output.requires_grad:  # not in the first pass of a reentrant checkpoint
            x = args[0].detach()
            output.register_hook(add)

    with ExitStack() as hooks:
        for layer in of_layer:
            hooks.enter_context(layer.register_forward_hook(hook))
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Leave the gradients of parameters and the mode of the model as they were, whatever happens."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    training = model.training
    model.train(
        getattr(model, "is_gradient_checkpointing", False)
    )  # without dropout, unless memory asks for it
    try:
        yield
    finally:
        model.train(training)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _check_gradients_flow(adapter: str, parts: Parts) -> None:
    """Refuse a model through which no gradient of the adapter would flow."""
    layers = [layer for of_group in parts.values() for layer, _ in of_group]
    if not torch.is_grad_enabled():
        raise ConfigError(
            "The start looks at gradients, and under torch.no_grad() or torch.inference_mode() there are none. Call it "
            "outside."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ConfigError(
            f"Adapter {adapter!r} is disabled, so no gradient reaches it. Leave the disable_adapter() block, or call "
            "enable_adapter_layers(), first."
        )
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ConfigError(
            f"Adapters {', '.join(merged)} are merged into the weights, so no gradient reaches {adapter!r}. Call "
            "unmerge_adapter() first."
        )


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"A batch is a {type(batch).__name__}, and the model takes it by name. Give mappings, for example "
            '{"input_ids": …, "labels": …}, or a function as loss.'
        )
    result: Tensor | None = getattr(model(**batch), "loss", None)
    if result is None:
        raise ConfigError(
            "The model gave no loss: the batch has no labels. Add them, or give a function as loss."
        )
    return result


def _check_loss(loss: Any, batch: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ConfigError(
            f"The loss of {batch} is a {type(loss).__name__} {shape}, and gradients are those of one number. Return a "
            "tensor of one element."
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"The loss of {batch} depends on no trained number: the adapter is frozen, or the loss was cut off from "
            "the model's output. Load the adapter with is_trainable=True, and let loss return a number with a gradient."
        )
    if not loss.isfinite():
        raise TrainingError(
            f"The loss of {batch} is {loss.item()}, so its gradients tell nothing; the factors are as they were. Look "
            "at that batch, or compute in a wider type than that of the base model."
        )
