"""`lotr.clip_updates`: steps of AdamW, divided by how much a gradient outgrows the mean of its squares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lotr
from commands import CtrlC, quiet, settings
from lotr.errors import Interrupted
from lotr.files.adapter_folder import WEIGHTS
from lotr.training.run import train

LR, BETA1, BETA2, EPS, DECAY = 0.1, 0.9, 0.95, 1e-8, 0.01


def _stable_adamw(start: Tensor, gradients: list[Tensor], clipped: bool) -> Tensor:
    """The steps as the papers write them."""
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients, 1):
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
        lr = LR / max(1.0, float((g**2 / v_hat).mean() ** 0.5)) if clipped else LR
        p = p * (1 - lr * DECAY) - lr * m_hat / (v_hat.sqrt() + EPS)
    return p


@pytest.mark.parametrize("clipped", [False, True])
def test_the_steps_are_those_of_the_papers(clipped: bool) -> None:
    torch.manual_seed(0)
    sizes = [(4, 3), (5,)]  # each tensor has a step of its own
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    growing = [[torch.randn(size) * 3**t for t in range(4)] for size in sizes]
    growing[1].reverse()  # of this one gradients fall, and nothing is divided
    expected = [_stable_adamw(p.detach(), g, clipped) for p, g in zip(parameters, growing, strict=True)]
    optimizer = torch.optim.AdamW(parameters, LR, (BETA1, BETA2), EPS, DECAY)
    if clipped:
        lotr.clip_updates(optimizer)
    for step in zip(*growing, strict=True):
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without gradients nothing moves
    torch.testing.assert_close(list(parameters), expected)


def test_a_run_clips_where_it_is_asked_to_also_when_it_goes_on(place: Path, tmp_path: Path) -> None:
    words = {"lr": 0.1, "core_lr": 0.1}
    train(settings(place, tmp_path / "plain", **words), say=quiet)
    train(settings(place, tmp_path / "straight", **words, clip_updates=True), say=quiet)
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path / "o", **words, clip_updates=True), say=quiet, callbacks=[CtrlC(2)])
    train(output=str(tmp_path / "o"), resume=True, say=quiet)
    plain, straight, resumed = ((tmp_path / n / WEIGHTS).read_bytes() for n in ("plain", "straight", "o"))
    assert straight == resumed != plain
