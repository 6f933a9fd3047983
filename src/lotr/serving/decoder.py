"""Prompts to text: rows of any tasks share the steps of a language model, and leave when they are done."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..bank.cache import LoadedTask
from ..training.tasks.served import Served
from .problems import Problem

_BEFORE = 5  # tokens of a prompt that decide how the next one reads


@dataclass(eq=False)
class Prompt:
    """A text that is to be continued."""

    task: LoadedTask  # that writes, as it was when the text came
    ids: list[int]
    max_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token
    stop: Sequence[str] = ()  # texts at which it ends; they are left out
    before: Sequence[
        int
    ] = ()  # tokens that the text goes on from, beside which its first word keeps its space
    seed: int | None = None  # without one, something else is drawn each time
    # given each piece, in the model's thread
    emit: Callable[[str], object] = field(default=lambda piece: None)
    left: bool = False  # whether nobody waits any more

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Continuation:
    """What was written, why it ended (`stop` or `length`), and how many tokens it has."""

    text: str
    reason: str
    tokens: int


class Decoder:
    """Continues texts with a bank's tasks."""

    #: A batch calls the model for every token that is written, whatever the prompts' lengths.
    call_tokens = 1 << 16

    def __init__(self, served: Served) -> None:
        self.served = served
        self._longest = getattr(served.model.config, "max_position_embeddings", None)
        ends = getattr(served.model.generation_config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else ends or []
        self._ends = {*ends, served.tokenizer.eos_token_id}
        self._takes = inspect.signature(served.model.get_base_model().forward).parameters

    def encode(
        self,
        name: str,
        texts: Sequence[str | Sequence[dict[str, Any]]],
        max_tokens: int | None,
        most: int,
        **options: Any,
    ) -> list[Prompt]:
        """Return texts, or conversations that are to be answered, in tokens, for `max_tokens` or as many as have room.

        No more than `most` tokens are ever written; `options` are those of `Prompt`.
        """
        task, prompts = self.served.task(name), []
        for text in texts:
            ids = self._ids(text)
            room = most if self._longest is None else min(most, self._longest - len(ids))
            if room < (max_tokens or 1):
                raise Problem(
                    422,
                    f"The model takes {self._longest} tokens in all: {len(ids)} were sent, and no answer of "
                    f"{max_tokens or 1} goes with them. Send less, or a smaller max_tokens.",
                    "max_tokens",
                    "context_length_exceeded",
                )
            before = ids[-_BEFORE:] if isinstance(text, str) else ()
            prompts.append(Prompt(task, ids, max_tokens or room, before=before, **options))
        return prompts

    def _ids(self, text: str | Sequence[dict[str, Any]]) -> list[int]:
        tokenizer = self.served.tokenizer
        if isinstance(text, str):
            return list(tokenizer(text)["input_ids"]) or [tokenizer.bos_token_id or tokenizer.eos_token_id]
        if tokenizer.chat_template is None:
            raise Problem(400, "The base model has no chat template. Use /v1/completions.", "messages")
        from jinja2 import TemplateError

        try:
            encoded = tokenizer.apply_chat_template(list(text), add_generation_prompt=True, return_dict=True)
        except TemplateError as error:
            raise Problem(422, f"The model's chat template refuses this: {error}.", "messages") from None
        return list(encoded["input_ids"])

    def run(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Any]]:
        """Yield number and continuation of each prompt as it ends."""
        steps = _Steps(self, prompts)
        rows = [torch.tensor(prompt.ids, dtype=torch.long) for prompt in prompts]
        flushed_right = partial(pad_sequence, batch_first=True, padding_side="left")
        with torch.inference_mode():
            # what one row breaks, it breaks here
            steps.forward(flushed_right(rows), flushed_right([torch.ones_like(row) for row in rows]))
            while steps.rows:
                try:
                    staying, ended = steps.write()
                    yield from ended
                    if steps.rows:
                        if ended:
                            steps.keep(staying)
                        steps.forward(torch.tensor([[steps.writers[row].ids[-1]] for row in steps.rows]))
                except Exception as error:  # what was written cannot be taken back
                    yield from ((row, error) for row in steps.rows)
                    return


class _Steps:
    """The rows of a batch that still write, and the model's memory of them."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt]) -> None:
        self.decoder, self.prompts = decoder, prompts
        self.rows = list(range(len(prompts)))
        self.writers = [_Writer(decoder.served.tokenizer, prompt) for prompt in prompts]
        self.mask = torch.empty(len(prompts), 0, dtype=torch.long, device=decoder.served.model.device)
        self.memory: Any = None
        self.logits = torch.empty(0)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> None:  # (rows, new tokens)
        """Read tokens; leaves the logits of what comes next."""
        model = self.decoder.served.model
        ids = ids.to(model.device)
        self.mask = torch.cat([self.mask, (torch.ones_like(ids) if mask is None else mask).to(ids)], 1)
        places = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": places, "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in self.decoder._takes}
        with self.decoder.served.rows.use([self.prompts[row].task for row in self.rows]):
            output = model(**inputs, past_key_values=self.memory, use_cache=True)
        self.memory, self.logits = output.past_key_values, output.logits[:, -1].float().cpu()

    def write(self) -> tuple[list[int], list[tuple[int, Any]]]:
        """Write a token a row; returns the places of those that go on, and the rows that have ended, which leave."""
        staying: list[int] = []
        ended: list[tuple[int, Any]] = []
        for place, (row, logits) in enumerate(zip(self.rows, self.logits, strict=True)):
            prompt, writer = self.prompts[row], self.writers[row]
            try:
                reason = "stop" if prompt.left else writer.write(logits, self.decoder._ends)
            except Exception as error:  # numbers of its task that are not finite, and nothing of the others
                ended.append((row, error))
                continue
            if reason is None:
                staying.append(place)
            else:
                ended.append((row, Continuation(writer.text, reason, len(writer.ids))))
        self.rows = [self.rows[place] for place in staying]
        return staying, ended

    def keep(self, places: Sequence[int]) -> None:
        """Forget what the model remembers of rows at other places."""
        kept = torch.tensor(places, device=self.mask.device)
        self.mask = self.mask[kept]
        self.memory.reorder_cache(kept)  # which layers without keys and values, of linear attention, have too


class _Writer:
    """The answer to one prompt as it grows."""

    def __init__(self, tokenizer: Any, prompt: Prompt) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.ids: list[int] = []
        self.text = ""  # what was given out
        self._held = ""  # what may be the beginning of a text to stop at
        self._seen = [*prompt.before]  # and then what is written
        self._begin, self._shown = (
            0,
            len(prompt.before),
        )  # whose text was taken; before `_begin` they change it no more
        seed = secrets.randbits(63) if prompt.seed is None else prompt.seed
        self._generator = torch.Generator().manual_seed(seed)

    def write(self, logits: Tensor, ends: set[int]) -> str | None:  # (vocabulary,)
        """Draw a token; returns why the text ends with it, if it does."""
        token = self._draw(logits)
        self.ids.append(token)
        self._seen.append(token)
        if token in ends:
            self._give(self._held)
            return "stop"
        full = len(self.ids) == self.prompt.max_tokens
        text = self._held + self._new(full)
        at = min((text.find(stop) for stop in self.prompt.stop if stop in text), default=-1)
        if at >= 0:
            self._give(text[:at])
            return "stop"
        begun = 0 if full else max((_overlap(text, stop) for stop in self.prompt.stop), default=0)
        safe = len(text) - begun
        self._give(text[:safe])
        self._held = text[safe:]
        return "length" if full else None

    def _draw(self, logits: Tensor) -> int:
        if self.prompt.temperature == 0:
            return int(logits.argmax())
        shares = torch.softmax((logits - logits.max()) / self.prompt.temperature, -1)
        return int(torch.multinomial(shares, 1, generator=self._generator))

    def _new(self, full: bool) -> str:
        """Return the text that is new, as soon as its last character is whole."""

        def text(last: int | None) -> str:
            decoded: str = self.tokenizer.decode(self._seen[self._begin : last], skip_special_tokens=True)
            return decoded

        before, now = text(self._shown), text(None)
        half = now.endswith("\N{REPLACEMENT CHARACTER}") and not full
        if half or now == before:  # a token without text of its own
            return ""
        self._begin, self._shown = self._shown, len(self._seen)
        return now[len(before) :]

    def _give(self, piece: str) -> None:
        if piece:
            self.text += piece
            self.prompt.emit(piece)


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of a text are the first of another.

    Example:
        >>> _overlap("the en", "end"), _overlap("the end", "x")
        (2, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
