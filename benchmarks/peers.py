"""What is compared: the frozen model, full fine-tuning, PEFT's methods and ours, all on the same frozen weights."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lotr import LotrConfig
from lotr.math import matmul
from shapes import SHAPES, SIZES, SIZES_CUDA, SIZES_NAMED, Batch


def _lora(r: int, linears: list[str], **more: Any) -> PeftConfig:
    return LoraConfig(r=r, lora_alpha=r, target_modules=linears, **more)


def _lotr(**more: Any) -> Callable[[int, list[str]], PeftConfig]:
    return lambda r, linears: LotrConfig(r=r, target_modules=linears, **more)


ADAPTERS: dict[str, Callable[[int, list[str]], PeftConfig]] = {
    "peft_lora": _lora,
    "peft_dora": lambda r, linears: _lora(r, linears, use_dora=True),
    "peft_vera": lambda r, linears: VeraConfig(r=r, target_modules=linears, save_projection=False),
    "lotr": _lotr(),
    "lotr_cores": _lotr(trainable="cores"),
    "lotr_per_output": _lotr(magnitude="per_output"),
    "lotr_per_output_cores": _lotr(magnitude="per_output", trainable="cores"),
    "lotr_per_output_and_input": _lotr(magnitude="per_output_and_input"),
    "lotr_base_and_update": _lotr(magnitude="base_and_update"),
}

FROZEN, FULL, LORA = "frozen", "full", "peft_lora"
#: Behind the name of a method: `torch.compile` has made one graph of the model; its update is in the weights; all
#: products are those of PyTorch, as for the frozen model and for PEFT.
COMPILED, MERGED, PLAIN = "_compiled", "_merged", "_without_onednn"
SHORT = (LORA, "lotr", "lotr_cores", f"lotr{PLAIN}")


def case_options(options: argparse.ArgumentParser) -> None:
    """Add the options that say which models and methods are measured."""
    endings = f"with {COMPILED} or {PLAIN} behind it for a variant"
    options.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all, short: the first")
    options.add_argument("--batch", type=int, help="rows, instead of the size of each model")
    options.add_argument("--length", type=int, default=128, help="tokens of a row, where --batch is given")
    options.add_argument(
        "--methods", nargs="+", metavar="METHOD", help=f"of {FULL}, {', '.join(ADAPTERS)}; {endings}"
    )


def settings(
    options: argparse.Namespace, device: torch.device, variants: bool = True
) -> Iterator[tuple[str, int, int, list[str]]]:
    """Yield model, batch, tokens and methods of what the options ask for; the frozen model is always the first.

    Args:
        options: Those of `case_options`.
        device: Where the models compute; it decides the sizes.
        variants: Whether methods with something behind their name are measured by default.
    """
    methods = options.methods or [
        *(SHORT if options.short else [*ADAPTERS, f"lotr{PLAIN}", f"lotr_cores{PLAIN}"])
    ]
    if not options.methods and not variants:
        methods = [name for name in methods if name in ADAPTERS]
    for name in methods:
        if plain(name) not in (*ADAPTERS, FULL, FROZEN):
            raise SystemExit(f"{name!r} is no method. There are {FULL}, {', '.join(ADAPTERS)}.")
    sizes = SIZES_CUDA if device.type == "cuda" else SIZES
    sizes = (*sizes, *SIZES_NAMED) if options.shapes else sizes[: 3 if options.short else None]
    if options.batch:
        sizes = tuple((shape, options.batch, options.length) for shape in dict.fromkeys(s[0] for s in sizes))
    for shape, batch, length in sizes:
        if options.shapes is None or shape in options.shapes:
            yield shape, batch, length, [FROZEN, *methods]


def with_graphs(shape: str, batch: int, methods: list[str]) -> list[str]:
    """Return methods, and at the one size of graphs the compiled frozen model, LoRA and LoTR."""
    if (shape, batch) != (SIZES[0][0], SIZES[0][1]):
        return methods
    return [*methods, *(name + COMPILED for name in (FROZEN, LORA, "lotr"))]


def plain(method: str) -> str:
    """Return the name of a method without what stands behind it."""
    return method.removesuffix(MERGED).removesuffix(COMPILED).removesuffix(PLAIN)


def make(method: str, rank: int, shape: str, base: PreTrainedModel, trains: bool = True) -> nn.Module:
    """Return a model for a method; it shares the frozen weights of `base`, which stays as it is.

    Args:
        method: Its name.
        rank: Of an adapter.
        shape: Name of the architecture.
        base: The frozen model.
        trains: Whether it will be trained; gradients then flow through every layer of the frozen model too.
    """
    if method == FULL:
        return copy.deepcopy(base).requires_grad_(True)
    if method.endswith(COMPILED):
        if method == FROZEN + COMPILED and trains:
            return torch.compile(_frozen(shape, base, graph=True), fullgraph=True)  # type: ignore[return-value]
        return torch.compile(make(plain(method), rank, shape, base, trains), fullgraph=True)  # type: ignore[return-value]
    if method.endswith(MERGED):
        return _adapted(plain(method), rank, shape, copy.deepcopy(base)).merge_and_unload()
    if method == FROZEN:
        return _frozen(shape, base) if trains else sharing(base)
    return _adapted(plain(method), rank, shape, sharing(base))


def sharing(base: Any) -> Any:
    """Return a copy of a model on the same numbers."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def _frozen(shape: str, base: PreTrainedModel, graph: bool = False) -> PreTrainedModel:
    """Return the frozen model; a graph cannot ask for a gradient inside, but can have one number that trains."""
    model = sharing(base)
    first = model.get_submodule(SHAPES[shape].blocks)[0]
    if graph:
        first.register_parameter("start", nn.Parameter(torch.zeros(())))
    first.register_forward_pre_hook(_input_has_gradient if graph else _input_requires_grad, with_kwargs=True)
    return model


def _adapted(method: str, rank: int, shape: str, model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    config = ADAPTERS[method](rank, list(SHAPES[shape].linears))
    config.target_parameters = list(SHAPES[shape].experts) or None  # type: ignore[attr-defined]
    return get_peft_model(model, config)


def _input_requires_grad(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    if torch.is_grad_enabled():
        hidden.requires_grad_()


def _input_has_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0] + module.start, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + module.start}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a method trains; the frozen model has none."""
    return [p for p in model.parameters() if p.requires_grad]


def training_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return one step: gradients set to none, forward, backward, AdamW over the trained numbers."""
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None
    device = batch.tokens.device.type

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = batch.loss(model)
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Leave all products to PyTorch. The only place that knows how the library's switch is called."""
    before, matmul.USE_ONEDNN = matmul.USE_ONEDNN, False
    try:
        yield
    finally:
        matmul.USE_ONEDNN = before


def variant(method: str, run: Callable[[], None]) -> Callable[[], None]:
    """Return a run as the name of its method asks: with all products taken by PyTorch, or as it is."""

    def alone() -> None:
        with _without_onednn():
            run()

    return alone if method.endswith(PLAIN) else run


def inference_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return one forward pass without gradients, of an adapter that has left its start: updates of zero have a path."""
    device = batch.tokens.device.type
    for number in trained(model):
        if not number.any():
            nn.init.normal_(number, std=1e-3)
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model(input_ids=batch.tokens)

    return step
