"""A stream of what is being written to one request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

from .decoder import Continuation, Prompt
from .openai import Form, event
from .problems import problem_of


class Writing:
    """Prompts of one request on their way through the model.

    Args:
        prompts: The prompts; what is written is sent on from the model's thread.

    Attributes:
        rows: Their answers to be.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.rows: list[asyncio.Future[Any]] = []
        self._news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for n, prompt in enumerate(prompts):
            prompt.emit = partial(self._tell, loop, n)

    def _tell(self, loop: asyncio.AbstractEventLoop, n: int, piece: str) -> None:
        loop.call_soon_threadsafe(self._news.put_nowait, (n, piece))

    def _end(self, n: int, row: asyncio.Future[Any]) -> None:
        self._news.put_nowait((n, row))

    def leave(self) -> None:
        """Wait no more: rows that wait leave the queue, those that are being written end with this step."""
        for prompt, row in zip(self.prompts, self.rows, strict=True):
            prompt.left = True
            row.cancel()

    async def pieces(
        self, form: Form, deadline: float, usage: bool, count: Callable[[list[Continuation]], None]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the events of the stream.

        Raises:
            Exception: The first news is that a row failed; after that it is an event.
        """
        for n, row in enumerate(self.rows):
            row.add_done_callback(partial(self._end, n))
        answers: dict[int, Continuation] = {}
        begun = False
        try:
            while len(answers) < len(self.rows):
                n, news = await asyncio.wait_for(self._news.get(), max(0.0, deadline - time.monotonic()))
                if not isinstance(news, str):
                    answers[n] = news.result()
                yield form.piece(n, *(news, None) if isinstance(news, str) else ("", answers[n].reason))
                begun = True
            count(list(answers.values()))
            if usage:
                yield form.total([*answers.values()], sum(prompt.length for prompt in self.prompts))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            if not begun:
                raise
            yield event(problem_of(error).body())
        finally:
            self.leave()
