"""How a request waits for its rows: no longer than its deadline, and no longer than its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from .problems import Problem


async def answers_of(request: Request, rows: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Return the answers of rows; those that are not waited for any more leave the queue.

    Raises:
        Exception: What the first row that failed got for an answer.
        TimeoutError: The deadline has passed.
        Problem: The client has left, so that nobody reads this.
    """
    everything: asyncio.Future[Any] = asyncio.gather(*rows, return_exceptions=True)
    gone = asyncio.create_task(_leaving(request))
    try:
        seconds = max(0.0, request.state.deadline - time.monotonic())
        await asyncio.wait({everything, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if everything.done():
            return _or_raise(everything.result())
        if gone.done():
            raise Problem(499, "The client has left.")
        raise TimeoutError
    finally:
        gone.cancel()
        for row in rows:
            row.cancel()


def _or_raise(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
