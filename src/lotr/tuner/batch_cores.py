"""Batches whose rows have cores of their own on the same shared factors, and a head of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..math.update import LinearMap
from ..sharing.groups import Group, Part
from ..sharing.keys import core_key, group_keys


@dataclass(frozen=True)
class HeadRows:
    """The heads of the rows of a batch.

    Args:
        groups: Numbers of rows whose heads have equal shapes, and their parameters: name in the head → `(n, *shape)`.
        outputs: Of every row's head, `(rows,)`.
        regression: Whether the only output of a row is a number, `(rows,)`.
        width: The most outputs of a row.
    """

    groups: list[tuple[Tensor | slice, dict[str, Tensor]]]
    outputs: Tensor
    regression: Tensor
    width: int


@dataclass(frozen=True)
class Rows:
    """What each row of a batch has of its own.

    Args:
        numbers: Name in an adapter's file → numbers of every row's cores, shape `(rows, *shape)`.
        head: The heads of the rows, where the model has one.
    """

    numbers: Mapping[str, Tensor]
    head: HeadRows | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(next(iter(self.numbers.values())))

    def cores(
        self, part: Part, shared: Mapping[str, Tensor], dropout: float = 0.0
    ) -> Tensor:  # (rows, a·k, b·r)
        """Return the cores of a part for each row, side by side; all rows share some numbers.

        `dropout` is the rate of dropping components, the same ones in all rows.
        """
        core = part.group.core
        if core.by_site:
            return self.numbers[core_key(part)]
        keys = group_keys(part.group)
        own = {name: self.numbers[keys[name]] for name in core.shapes if name not in shared}
        own = dict(core.drop_components(own, dropout)) if dropout else own
        return torch.vmap(lambda one: part.lay(core.block({**one, **shared}, part.region)))(own)

    def core(
        self, part: Part, shared: Mapping[str, Tensor], dropout: float = 0.0
    ) -> LinearMap:  # (m·rows, *n, b·r) -> (m·rows, *n, a·k)
        """Return the map that multiplies each row of a batch by its own cores of a part; see `cores`."""
        C = self.cores(part, shared, dropout)
        return lambda h: by_row(h, C.to(h.device))

    def biases(self, group: Group) -> dict[str, Tensor]:  # (rows, n) each
        """Return what each row adds to biases, by name."""
        keys = group_keys(group)
        return {name: self.numbers[keys[name]] for name in group.biases}


class RowsOfCall:
    """The `Rows` of the call that runs: a thread, or a task of asyncio, sees those that it selected itself.

    The modules of a model share one such object, and nothing is ever written into them. What is selected belongs to the
    context, which asyncio keeps apart; while a forward pass runs, its thread has it too, where a compiler can read it.

    Example:
        >>> current = RowsOfCall()
        >>> with current.use(Rows({})):
        ...     current.get()
        Rows(numbers={}, head=None)
        >>> current.get() is None
        True
    """

    def __init__(self) -> None:
        self._selected: ContextVar[Rows | object | None] = ContextVar("rows", default=_NOTHING_SELECTED)
        self._running = threading.local()

    def get(self) -> Rows | None:
        """Return the rows of this call, or `None` where it uses the base model.

        Raises:
            ConfigError: A layer runs again in the backward pass, in a thread that does not know the call.
        """
        rows = getattr(self._running, "rows", _NOTHING_SELECTED)
        if rows is _NOTHING_SELECTED:
            rows = self._selected.get()
        if isinstance(rows, Rows):
            return rows
        if rows is _NOTHING_SELECTED and not torch.compiler.is_compiling() and _in_backward():
            raise ConfigError(
                "A checkpointed layer runs again in the backward pass, where the tasks of its call are not known. "
                "Checkpoint with the model's own gradient_checkpointing_enable(), which remembers them."
            )
        return None

    @contextmanager
    def use(self, rows: Rows | None) -> Iterator[None]:
        """Use these rows in what this thread, or task of asyncio, runs inside; `None` for the base model."""
        token = self._selected.set(rows)
        try:
            yield
        finally:
            self._selected.reset(token)

    def see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the shape of the batch that a block around experts gets: a hook before its forward pass."""
        if not torch.compiler.is_compiling():
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            self._running.batch = None if x is None or x.dim() != 3 else (x.shape[0], x.shape[1])

    def take_batch(self) -> tuple[int, int] | None:
        """Return rows and tokens a row of the batch that was noted last, once; `None` where nothing was."""
        batch = getattr(self._running, "batch", None)
        self._running.batch = None
        return batch

    @contextmanager
    def running(self, rows: Rows | None) -> Iterator[None]:
        """Use these rows in a block that gives its thread to nothing else."""
        before = getattr(self._running, "rows", _NOTHING_SELECTED)
        self._running.rows = rows
        try:
            yield
        finally:
            self._running.rows = before

    def remember_in_checkpoints(self, model: nn.Module) -> None:
        """Let checkpointed layers run again with the rows of their call, whatever thread runs the backward pass.

        transformers keeps in each such module the function that checkpoints it; this puts one around it.
        """
        for module in model.modules():
            checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, _Remembering):
                module._gradient_checkpointing_func = _Remembering(self, checkpoint)  # type: ignore[assignment]

    def forget_in_checkpoints(self, model: nn.Module) -> None:
        """Undo `remember_in_checkpoints`."""
        for module in model.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, _Remembering):
                module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[RowsOfCall], tuple[()]]:
        return RowsOfCall, ()  # a copy of a model has calls of its own


@dataclass(frozen=True)
class _Remembering:
    """A checkpointing function that calls what it checkpoints with the rows of the call, both times."""

    current: RowsOfCall
    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self.current.get()
        names = [] if rows is None else list(rows.numbers)

        def run(*inputs: Any, **named: Any) -> Any:
            numbers = dict(zip(names, inputs[len(args) :], strict=True))
            with self.current.running(None if rows is None else replace(rows, numbers=numbers)):
                return function(*inputs[: len(args)], **named)

        # the numbers are inputs too: a reentrant checkpoint gives gradients to nothing else
        return self.checkpoint(run, *args, *([] if rows is None else rows.numbers.values()), **kwargs)


_NOTHING_SELECTED = object()


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # torch tells it nowhere else


def by_row(
    h: Tensor,  # (m·rows, *n, q)
    C: Tensor,  # (rows, p, q)
) -> Tensor:  # (m·rows, *n, p)
    """Multiply each row of a batch by its own matrix, in one batched product.

    A batch may have every row several times in a run: beams of a search, or tokens laid out row after row.

    Raises:
        ConfigError: The batch is no multiple of the rows.

    Example:
        >>> by_row(torch.randn(6, 5, 3), torch.randn(2, 4, 3)).shape
        torch.Size([6, 5, 4])
    """
    rows = len(C)
    if h.shape[0] % rows:
        raise ConfigError(
            f"Every row of a batch needs a task: tasks are selected for {rows} rows, and the batch has {h.shape[0]}. "
            "Name one task a row, None for the base model."
        )
    return torch.bmm(h.reshape(rows, -1, h.shape[-1]), C.mT).reshape(*h.shape[:-1], C.shape[1])
