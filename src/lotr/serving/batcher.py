"""Rows of many requests gathered into batches, which one thread runs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from .problems import Problem
from .settings import ServeSettings


@dataclass(eq=False)
class _Waiting:
    job: Any  # its `length` is how many tokens it has, by which rows are put together
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Gathers rows until there are `max_batch` of them or the oldest has waited `max_wait`, and runs them.

    The oldest row is in every batch, so nobody starves; beside it are those near it in length with which the least work
    is padding. While a batch runs, the next one gathers. A row whose request was cancelled leaves the queue.

    Args:
        run: Yields number and answer of each job as they come, in a thread that runs nothing else. An answer may be an
            exception, which that job's request gets; after one that is raised, those without an answer run alone.
        settings: How many rows, how long.
        call_tokens: What running the model costs beside the tokens of a batch, in tokens.
        observe: Told of every batch how long each of its rows has waited, in seconds.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Iterable[tuple[int, Any]]],
        settings: ServeSettings,
        call_tokens: int,
        observe: Callable[[Sequence[float]], None],
    ) -> None:
        self._run, self._settings, self._call_tokens, self._observe = run, settings, call_tokens, observe
        self._waiting: dict[asyncio.Future[Any], _Waiting] = {}  # the oldest first
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._seconds_a_row = 0.01  # a running mean
        self._closing = False
        self._loop: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def accepts(self) -> bool:
        """Whether another row may wait."""
        return not self._closing and len(self) < self._settings.max_queue

    def start(self) -> None:
        """Begin to run batches, in the running event loop."""
        self._loop = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Finish what waits, and end."""
        self._closing = True
        self._changed.set()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    def check_room(self, rows: int) -> None:
        """Raise a problem if so many rows more may not wait."""
        if len(self) + rows > self._settings.max_queue:
            seconds = max(1, math.ceil(len(self) * self._seconds_a_row))
            message = f"{len(self)} rows are waiting, and no more may. Try again in {seconds} s."
            raise Problem(429, message, code="queue_full", headers={"Retry-After": str(seconds)})

    def submit(self, jobs: Sequence[Any]) -> list[asyncio.Future[Any]]:
        """Put rows into the queue, all of them or, with a problem, none."""
        self.check_room(len(jobs))
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Any]] = [loop.create_future() for _ in jobs]
        for job, answer in zip(jobs, answers, strict=True):
            self._waiting[answer] = _Waiting(job, answer)
            answer.add_done_callback(lambda done: self._waiting.pop(done, None))
        self._changed.set()
        return answers

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or not self._closing:
            oldest, patience = next(iter(self._waiting.values()), None), None
            if oldest is not None:
                patience = oldest.since + self._settings.max_wait / 1000 - time.monotonic()
            gathers = not self._closing and len(self) < self._settings.max_batch
            if patience is None or (patience > 0 and gathers):
                self._changed.clear()
                with suppress(TimeoutError):  # until rows come or leave
                    await asyncio.wait_for(self._changed.wait(), patience)
                continue
            rows = self._take()
            began = time.monotonic()
            self._observe([began - row.since for row in rows])
            await loop.run_in_executor(self._thread, self._answer, rows, loop)
            self._seconds_a_row += 0.1 * ((time.monotonic() - began) / len(rows) - self._seconds_a_row)

    def _take(self) -> list[_Waiting]:
        """Take the oldest row out of the queue, and the neighbours by length with which it wastes least."""
        oldest = next(iter(self._waiting.values()))
        rows = sorted(self._waiting.values(), key=lambda row: row.job.length)
        own, size = rows.index(oldest), self._settings.max_batch
        tokens = [0, *accumulate(row.job.length for row in rows)]

        def useful_part(batch: tuple[int, int]) -> float:
            first, end = batch
            padded = (end - first) * rows[end - 1].job.length
            return (tokens[end] - tokens[first]) / (self._call_tokens + padded)

        batches = (
            (first, end)
            for first in range(max(0, own + 1 - size), own + 1)
            for end in range(own + 1, min(len(rows), first + size) + 1)
        )
        first, end = max(batches, key=useful_part)
        for row in rows[first:end]:
            del self._waiting[row.answer]
        return rows[first:end]

    def _answer(self, rows: Sequence[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """Run a batch in the model's thread; what one row breaks is run again without it."""
        left = dict(enumerate(rows))
        try:
            for n, answer in self._run([row.job for row in rows]):
                loop.call_soon_threadsafe(_settle, left.pop(n).answer, answer)
        except Exception as error:
            if len(rows) == 1 and left:
                loop.call_soon_threadsafe(_settle, rows[0].answer, error)
                return
            for row in left.values():
                self._answer([row], loop)


async def answers_of(rows: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Return the answers of rows; after an error, or when nobody waits any more, all of them leave the queue."""
    try:
        return await asyncio.gather(*rows)
    finally:
        for row in rows:
            row.cancel()


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # its client has left
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
