"""Steps of Adam that do not grow past their rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clip_updates(optimizer: torch.optim.Optimizer) -> None:
    """Divide the step of every tensor by how much its gradient outgrows the mean of its squares, where it does.

    AdamW moves a tensor by `lr · m̂ / √v̂`. Gradients that grow faster than `v̂` follows make that larger than the rate
    says, and a run goes astray. From now on the step, weight decay with it, is divided by
    `max(1, √mean(g² / v̂))`. It keeps nothing between steps, so a run that goes on needs the call again.

    Args:
        optimizer: `Adam` or `AdamW` of torch, also for the factors and cores of `parameter_groups`.

    Source: Adafactor, https://arxiv.org/abs/1804.04235; StableAdamW, https://arxiv.org/abs/2304.13013.
    """
    kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            kept.update({p: p.detach().clone() for p in group["params"] if p.grad is not None})

    @torch.no_grad()
    def after(*_: Any) -> None:
        for group in optimizer.param_groups:
            beta2, smallest = group["betas"][1], group["eps"] ** 2
            for p in group["params"]:
                if p in kept:
                    state, old = optimizer.state[p], kept.pop(p)
                    v = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
                    outgrown = (p.grad.square() / v.clamp(min=smallest)).mean().sqrt().clamp(min=1)
                    p.copy_(old + (p - old) / outgrown)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
