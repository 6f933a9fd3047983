"""What the benchmarks on the packaged decoder of thirty layers share: its texts, a short training, a loss."""

from __future__ import annotations

import itertools
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lotr.training.base_model import load_model
from lotr.training.data.docstrings import load_functions
from real_loras import texts_of


def load_bfloat16(model: str) -> nn.Module:
    """Return a decoder whose products are bfloat16.

    Autocast caches its casts until it exits, so it wraps one forward pass: the trained numbers change between steps.
    """
    base: nn.Module = load_model(model, "causal-lm")
    base.forward = torch.autocast("cpu", torch.bfloat16)(base.forward)
    return base


def docstrings(split: str) -> list[str]:
    """Return the functions of Python's own library, each with its docstring."""
    return [f'def {of["prompt"]}: """{of["completion"]}"""' for of in load_functions()[split]]


def texts(task: str, data: Path | None) -> list[str]:
    """Return texts in a fixed order: docstrings or source of Python's own library, or a set of a folder."""
    if task == "docstrings":
        own = docstrings("train")
    elif task == "source":
        library = Path(sysconfig.get_paths()["stdlib"])
        own = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("*.py"))]
    elif data is None:
        raise SystemExit(f"{task} lies in a folder of data sets. Name it with --data.")
    else:
        return texts_of(data / task, "train")
    random.Random(0).shuffle(own)
    return own


def packed(tokenizer: Any, own: Iterable[str], length: int, most: int) -> Tensor:
    """Return texts joined and cut into rows of tokens, `(rows, length)`; `most` rows, or fewer where texts end."""
    tokens: list[int] = []
    for text in own:
        tokens += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= most * length:
            break
    rows = min(len(tokens) // length, most)
    return torch.tensor(tokens[: rows * length]).view(rows, length)


def batches(tokens: Tensor, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches without end, in an order that depends on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(tokens), generator=draw)[: len(tokens) // size * size].split(size):
            yield {"input_ids": tokens[part], "labels": tokens[part]}


def loss_of(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean loss per token."""
    model.eval()
    with torch.inference_mode():
        losses = [float(model(input_ids=some, labels=some).loss) * len(some) for some in tokens.split(8)]
    return sum(losses) / len(tokens)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[dict[str, Tensor]],
    steps: int,
    warmup: int,
) -> None:
    """Train with rates that rise for some steps and then fall to zero, and gradients clipped to a norm of one."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    for batch in itertools.islice(stream, steps):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
