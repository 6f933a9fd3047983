"""How a request waits for its rows: no longer than its deadline, and no longer than its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from .problems import Problem

T = TypeVar("T")


async def answers_of(request: Request, rows: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Return the answers of rows; those that are not waited for any more leave the queue.

    Raises:
        Exception: What the first row that failed got for an answer, or see `waited_for`.
    """
    try:
        answers = await waited_for(request, _all(rows))
    finally:
        for row in rows:
            row.cancel()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


async def _all(rows: Sequence[asyncio.Future[Any]]) -> list[Any]:
    return await asyncio.gather(*rows, return_exceptions=True)


async def waited_for(request: Request, awaited: Coroutine[Any, Any, T]) -> T:
    """Return what is awaited.

    Raises:
        TimeoutError: The deadline has passed.
        Problem: The client has left, so that nobody reads this.
    """
    wanted, gone = asyncio.create_task(awaited), asyncio.create_task(_leaving(request))
    try:
        seconds = max(0.0, request.state.deadline - time.monotonic())
        await asyncio.wait({wanted, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        if gone.done():
            raise Problem(499, "The client has left.")
        raise TimeoutError
    finally:
        gone.cancel()
        wanted.cancel()


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
