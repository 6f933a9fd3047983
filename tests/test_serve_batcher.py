"""How rows become batches: of about one length, nobody left behind, each answer to its own row."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("fastapi")

from lotr.serving.batcher import Batcher, answers_of
from lotr.serving.problems import Problem
from lotr.serving.settings import ServeSettings

CALL_TOKENS = 32


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    return lambda: asyncio.run(test())


@dataclass(frozen=True)
class Job:
    """A row; `number` is its place in the order of arrival."""

    number: int
    length: int


class Model:
    """Notes its batches, and waits in the first one until it may go on, so that the others are all in the queue."""

    def __init__(self) -> None:
        self.batches: list[list[Job]] = []
        self.waits: list[float] = []
        self.go_on = threading.Event()

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        self.go_on.wait(30)
        self.batches.append(list(jobs))
        yield from ((n, job.number) for n, job in enumerate(jobs))

    def batcher(self, **limits: Any) -> Batcher:
        limits = {"max_texts": 1, "max_wait": 0.0, **limits}
        return Batcher(self.run, ServeSettings(**limits), CALL_TOKENS, self.waits.extend)


def batches_of(lengths: Sequence[int], max_batch: int) -> list[list[Job]]:
    """Return the batches of rows that all wait already, having checked that each got its own answer."""

    async def ask() -> list[list[Job]]:
        model = Model()
        batcher = model.batcher(max_batch=max_batch)
        batcher.start()
        first = batcher.submit([Job(-1, 1)])
        await asyncio.sleep(0.05)  # now it runs, and everything else waits
        rows = batcher.submit([Job(n, length) for n, length in enumerate(lengths)])
        model.go_on.set()
        assert await answers_of(rows) == list(range(len(lengths))) and await answers_of(first) == [-1]
        await batcher.close()
        return model.batches[1:]

    return asyncio.run(ask())


def padded(batches: Sequence[Sequence[Job]]) -> int:
    """Return how many tokens a model computes for batches, padding among them."""
    return sum(CALL_TOKENS + len(batch) * max(job.length for job in batch) for batch in batches)


def test_short_and_long_rows_are_not_mixed() -> None:
    batches = batches_of([10, 200] * 8, max_batch=8)
    assert [{job.length for job in batch} for batch in batches] == [{10}, {200}]


def test_a_batch_of_near_lengths_is_filled_where_a_call_costs_more_than_padding() -> None:
    assert len(batches_of([10, 11, 12, 13], max_batch=4)) == 1


def test_rows_of_one_length_run_in_the_order_in_which_they_came() -> None:
    batches = batches_of([7] * 20, max_batch=8)
    assert [[job.number for job in batch] for batch in batches] == [
        [*range(8)],
        [*range(8, 16)],
        [*range(16, 20)],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_oldest_row_is_in_every_batch_and_padding_is_less_than_in_the_order_of_arrival(seed: int) -> None:
    lengths = [int(random.Random(seed + n).lognormvariate(3, 1)) + 1 for n in range(100)]
    batches = batches_of(lengths, max_batch=16)
    left = set(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 16 and min(left) in {job.number for job in batch}
        left -= {job.number for job in batch}
    jobs = [Job(n, length) for n, length in enumerate(lengths)]
    assert padded(batches) < padded([jobs[n : n + 16] for n in range(0, len(jobs), 16)])


@in_a_loop
async def test_a_batch_begins_when_it_is_full_or_its_oldest_row_has_waited() -> None:
    model = Model()
    model.go_on.set()
    batcher = model.batcher(max_batch=3, max_wait=60_000.0)
    batcher.start()
    assert await answers_of(batcher.submit([Job(n, 1) for n in range(3)])) == [0, 1, 2]  # at once
    await batcher.close()
    batcher = model.batcher(max_batch=3, max_wait=50.0)
    batcher.start()
    model.waits.clear()
    await answers_of(batcher.submit([Job(0, 1)]))
    assert model.waits[0] >= 0.05
    await batcher.close()


@in_a_loop
async def test_rows_that_wait_are_finished_at_the_end_and_those_given_up_leave() -> None:
    model = Model()
    batcher = model.batcher(max_batch=8, max_wait=60_000.0)
    batcher.start()
    kept, given_up = batcher.submit([Job(0, 1)]), batcher.submit([Job(1, 1), Job(2, 1)])
    given_up[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await answers_of(given_up)  # the other row of that request leaves with it
    await asyncio.sleep(0)
    assert len(batcher) == 1
    model.go_on.set()
    await batcher.close()
    assert await answers_of(kept) == [0] and [len(batch) for batch in model.batches] == [1]
    assert not batcher.accepts


@in_a_loop
async def test_a_queue_takes_all_rows_of_a_request_or_none() -> None:
    batcher = Model().batcher(max_queue=4)
    batcher.submit([Job(n, 1) for n in range(3)])
    with pytest.raises(Problem) as refused:
        batcher.submit([Job(3, 1), Job(4, 1)])
    assert refused.value.status == 429 and int((refused.value.headers or {})["Retry-After"]) >= 1
    assert len(batcher) == 3


def test_what_one_row_breaks_the_others_do_not_notice() -> None:
    class Breaking(Model):
        def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
            if any(job.number == 1 for job in jobs):
                raise ValueError("row 1")
            yield from super().run(jobs)

    async def ask() -> None:
        model = Breaking()
        model.go_on.set()
        batcher = model.batcher()
        batcher.start()
        answers = await asyncio.gather(*batcher.submit([Job(n, 1) for n in range(3)]), return_exceptions=True)
        assert answers[::2] == [0, 2] and isinstance(answers[1], ValueError)
        await batcher.close()

    asyncio.run(ask())
