"""AdamW over tables of which a step touches a few rows: every row has its own moments and its own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RowAdam(Optimizer):
    """AdamW for tables whose rows belong to tasks: row `t` of every table is a number of task `t`.

    A row without a gradient is left alone: it does not move, its moments do not decay, its steps are not counted. So a
    task is trained exactly as if AdamW had it alone. The gradient's norm is clipped task by task, over all tables.
    A step uses the gradients up: they are gone afterwards.

    Args:
        params: Tables `(slots, numbers)` with sparse gradients, or groups of them.
        lr: Learning rate.
        betas: Decay of the two moments a step.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of the numbers.
        max_norm: Largest norm of a task's gradient.

    Source: AdamW, https://arxiv.org/abs/1711.05101

    Example:
        >>> table = torch.zeros(4, 3, requires_grad=True)
        >>> rows = torch.nn.functional.embedding(torch.tensor([2]), table, sparse=True)
        >>> rows.sum().backward()
        >>> RowAdam([table], lr=0.1).step()
        >>> [round(number, 3) for number in table[:, 0].tolist()]
        [0.0, 0.0, -0.1, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        )
        for table in self._tables():
            self.state[table] = {
                "step": table.new_zeros(len(table)),
                "exp_avg": torch.zeros_like(table),
                "exp_avg_sq": torch.zeros_like(table),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with the rows that have a gradient."""
        assert closure is None, "a second look at the loss is not supported"
        grads = {table: table.grad.coalesce() for table in self._tables() if table.grad is not None}
        if not grads:
            return
        shares = self._shares(list(grads.values()))
        for group in self.param_groups:
            for table in group["params"]:
                if table in grads:
                    self._move(table, grads[table], shares, group)
                table.grad = None

    def _shares(self, grads: list[Tensor]) -> Tensor:  # (slots,)
        """Return by what each task's gradient is multiplied to keep its norm."""
        squares = grads[0].values().new_zeros(grads[0].shape[0])
        for grad in grads:
            squares.index_add_(0, grad.indices()[0], grad.values().square().sum(1))
        share: Tensor = (self.defaults["max_norm"] / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        return share

    def _move(self, table: Tensor, grad: Tensor, shares: Tensor, group: dict[str, Any]) -> None:
        at, state = grad.indices()[0], self.state[table]
        g = grad.values() * shares[at, None]
        b1, b2 = group["betas"]
        state["step"][at] += 1
        m = state["exp_avg"][at].lerp(g, 1 - b1)
        v = state["exp_avg_sq"][at].lerp(g.square(), 1 - b2)
        state["exp_avg"][at], state["exp_avg_sq"][at] = m, v
        t = state["step"][at, None]
        change = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        table[at] = table[at] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change

    def _tables(self) -> list[Tensor]:
        return [table for group in self.param_groups for table in group["params"]]
