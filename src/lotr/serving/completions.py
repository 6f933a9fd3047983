"""Completions and chats in the form of OpenAI's API: the answers, whole or as they are written."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

from .bodies import Asked, Chat
from .decoder import Continuation, Prompt
from .problems import event


class Writing:
    """The answer to one request while it is written, in OpenAI's form.

    `submit` puts the prompts into the queue; `count` is told of the answers once all are there.
    """

    def __init__(
        self,
        asked: Asked,
        prompts: Sequence[Prompt],
        submit: Callable[[Sequence[Prompt]], list[asyncio.Future[Any]]],
        count: Callable[[Sequence[Continuation]], None],
    ) -> None:
        self.asked, self.prompts, self.count = asked, prompts, count
        self.chat = isinstance(asked, Chat)
        name, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        self.chunk_name = f"{name}.chunk" if self.chat else name
        self.head: dict[str, Any] = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": name}
        self.head |= {"created": int(time.time()), "model": asked.model}
        self._news: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for n, prompt in enumerate(prompts):  # from the model's thread
            prompt.emit = partial(loop.call_soon_threadsafe, partial(self._tell, n))
        self.rows = submit(prompts)
        for n, row in enumerate(self.rows):
            row.add_done_callback(partial(self._tell, n))

    def _tell(self, n: int, news: str | asyncio.Future[Any]) -> None:
        self._news.put_nowait((n, news))

    async def pieces(self) -> AsyncGenerator[tuple[int, str, Continuation | None], None]:
        """Yield number, text and, at its end, the whole of each answer as they are written.

        When nobody takes them any more, rows that wait leave the queue, and those that are being written end with this
        step.
        """
        answers: list[Continuation] = []
        try:
            while len(answers) < len(self.rows):
                n, news = await self._news.get()
                if isinstance(news, str):
                    yield n, news, None
                else:
                    answers.append(news.result())
                    yield n, "", answers[-1]
            self.count(answers)
        finally:
            for prompt, row in zip(self.prompts, self.rows, strict=True):
                prompt.left = True
                row.cancel()

    async def whole(self) -> dict[str, Any]:
        """Return everything at once."""
        answers = {n: answer async for n, _, answer in self.pieces() if answer}
        choices = [self._choice(n, answers[n].text, answers[n].reason, "message") for n in sorted(answers)]
        return {**self.head, "choices": choices, "usage": self._usage([*answers.values()])}

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield everything as the events of a stream."""
        chunk, answers, begun = {**self.head, "object": self.chunk_name}, list[Continuation](), set[int]()
        async for n, text, answer in self.pieces():
            answers += [answer] if answer else []
            choice = self._choice(n, text, answer.reason if answer else None, "delta")
            if n in begun:  # clients join what the deltas of an answer say
                choice.get("delta", {}).pop("role", None)
            begun.add(n)
            yield event({**chunk, "choices": [choice]})
        if (self.asked.stream_options or {}).get("include_usage"):
            yield event({**chunk, "choices": [], "usage": self._usage(answers)})
        yield b"data: [DONE]\n\n"

    def _choice(self, index: int, text: str, reason: str | None, key: str) -> dict[str, Any]:
        own = {key: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **own, "finish_reason": reason, "logprobs": None}

    def _usage(self, answers: Sequence[Continuation]) -> dict[str, int]:
        read, written = sum(p.length for p in self.prompts), sum(answer.tokens for answer in answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
