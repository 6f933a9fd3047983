"""What is compared: the floor, full fine-tuning, PEFT's methods and ours, all on the same frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lotr import LotrConfig
from lotr.math import matmul
from shapes import SHAPES, Batch


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

FLOOR, TIGHT, FULL, BASE = "floor", "floor_tight", "full", "base"
# behind the name of a method: its update is in the weights; torch.compile has made one graph of the model
# all products are taken by MKL, as PyTorch takes those of the frozen model
MERGED, COMPILED, MKL = "_merged", "_compiled", "_mkl"
TEXT = {
    FLOOR: "frozen model, gradients flow through every layer, no adapter",
    TIGHT: "the same, without the gradient of the first layer's input, which no adapter needs",
    FULL: "full fine-tuning",
    "peft_lora": "PEFT's LoRA",
    "peft_dora": "PEFT's DoRA",
    "peft_vera": "PEFT's VeRA",
    "lotr": "LoTR, factors and cores trained",
    "lotr_cores": "LoTR, cores trained",
    "lotr_per_output": "LoTR with a norm for every output",
    "lotr_per_output_cores": "the same, cores and norms trained",
    "lotr_per_output_and_input": "LoTR with norms for every output and input",
    "lotr_base_and_update": "LoTR with a size of the base and of the update",
    "…"
    + COMPILED: "the method in front, by `torch.compile(fullgraph=True)`; the floor then trains one number",
    "…" + MKL: "the method in front, with all products by MKL, as PyTorch has them",
}


def label(method: str, rank: int | None) -> str:
    """Return the name of a method at a rank."""
    return method if rank is None else f"{method} r={rank}"


def plain(method: str) -> str:
    """Return the name of a method without what stands behind it."""
    return method.removesuffix(MERGED).removesuffix(COMPILED).removesuffix(MKL)


def make(method: str, rank: int | None, shape: str, base: PreTrainedModel, graph: bool = False) -> nn.Module:
    """Return a model for a method; it shares the frozen weights of `base`, which stays as it is.

    Args:
        method: Its name.
        rank: Of an adapter.
        shape: Name of the architecture.
        base: The frozen model.
        graph: Whether the model will be compiled.
    """
    if method == FULL:
        return copy.deepcopy(base).requires_grad_(True)
    if method.endswith(COMPILED):
        return torch.compile(make(plain(method), rank, shape, base, True), fullgraph=True)  # type: ignore[return-value]
    if method.endswith(MERGED):
        own = copy.deepcopy(base)
        return _adapted(plain(method), rank, shape, own).merge_and_unload()
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if method == BASE:
        return model
    first = model.get_submodule(SHAPES[shape].blocks)[0]
    if method == FLOOR and graph:  # which cannot ask for a gradient inside, but can have a number that trains
        first.register_parameter("start", nn.Parameter(torch.zeros(())))
        first.register_forward_pre_hook(_input_has_gradient, with_kwargs=True)
        return model
    if method == FLOOR:
        first.register_forward_pre_hook(_input_requires_grad, with_kwargs=True)
        return model
    if method == TIGHT:
        for path, module in first.named_modules():
            if path.rpartition(".")[2] in SHAPES[shape].linears:
                module.register_forward_hook(_output_requires_grad)
        return model
    return _adapted(plain(method), rank, shape, model)


def _adapted(method: str, rank: int | None, shape: str, model: PreTrainedModel) -> PeftModel:
    assert rank is not None
    torch.manual_seed(0)
    return get_peft_model(model, ADAPTERS[method](rank, list(SHAPES[shape].linears)))


def _input_requires_grad(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    if torch.is_grad_enabled():
        hidden.requires_grad_()


def _input_has_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0] + module.start, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + module.start}


def _output_requires_grad(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a method trains; the floor has none."""
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


def mkl_alone(run: Callable[[], None]) -> Callable[[], None]:
    """Return a run in which the library takes no product with oneDNN."""

    def alone() -> None:
        before, matmul.USE_ONEDNN = matmul.USE_ONEDNN, False
        try:
            run()
        finally:
            matmul.USE_ONEDNN = before

    return alone


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
