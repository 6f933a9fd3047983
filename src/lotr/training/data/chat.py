"""Conversations to token ids, with a loss on the assistant's answers only."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that takes no part in the loss, as in `torch.nn.CrossEntropyLoss`."""

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Chat:
    """A conversation, and the tokenizer whose chat template it is rendered with."""

    tokenizer: PreTrainedTokenizerBase
    content: str  # what `conversation` made of a row
    row: int  # its number, for messages

    @cached_property
    def turns(self) -> Turns:
        """The turns, as the template is given them."""
        turns: Turns = json.loads(self.content)["messages"]
        return [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]

    def encoded(self, max_length: int, with_labels: bool = True) -> dict[str, list[Any]]:
        """Return the first `max_length` tokens, and `labels`.

        A template that marks answers with `{% generation %}` says itself what is learned. With any other, the
        tokens of an answer are those between the prompt for it and the end of its turn, which is checked. Answers
        that are empty, or have the weight 0, are not learned.

        Raises:
            DataError: The tokenizer has no chat template, the template refuses the conversation, or the answers
                cannot be told from the rest.
        """
        tokenizer = self.tokenizer
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, so "
                "conversations cannot be encoded. Use an instruction-tuned model, set tokenizer.chat_template, "
                "or give plain texts and name their column with --text."
            ) from error
        encoded = self._rendered(self.turns)
        if with_labels:
            ids = encoded["input_ids"]
            # slow tokenizers do not know which token a character went to
            is_marked = tokenizer.is_fast and GENERATION_TAG.search(template) is not None
            marked = self._marked() if is_marked else None
            mask = list(marked or [0] * len(ids))
            for turn, is_learned in self._answers().items():
                # to be learned and not marked yet, or marked and not to be learned
                if is_learned != bool(marked):
                    span = self._span(turn, ids)
                    mask[span] = [int(is_learned)] * len(mask[span])
            encoded["labels"] = [
                token if taught else IGNORED for token, taught in zip(ids, mask, strict=True)
            ]
        return {name: values[:max_length] for name, values in encoded.items()}

    def prompt(self) -> str:
        """Return the text that asks for an answer to the last question (DataError where there is none)."""
        questions = [n for n, turn in enumerate(self.turns) if turn["role"] != "assistant"]
        if not questions:
            raise DataError(f"Row {self.row} holds only answers; there is nothing to answer to. Drop it.")
        return self._applied(self.turns[: questions[-1] + 1], tokenize=False, add_generation_prompt=True)

    def _answers(self) -> dict[int, bool]:
        """Return the numbers of the assistant's turns, and whether each is learned."""
        turns = enumerate(json.loads(self.content)["messages"])
        answers = {n: turn for n, turn in turns if turn["role"] == "assistant"}
        return {
            n: turn.get("weight") != 0 and bool(turn["content"].strip() or turn.get("tool_calls"))
            for n, turn in answers.items()
        }

    def _applied(self, turns: Turns, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            tools = json.loads(self.content)["tools"]
            return self.tokenizer.apply_chat_template(turns, tools=tools or None, **options)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"Row {self.row}: the chat template refuses this conversation ({error}). Its roles are: {roles}. "
                "Mend or drop the row."
            ) from error

    def _rendered(self, turns: Turns, **options: Any) -> dict[str, list[Any]]:
        options.setdefault("tokenizer_kwargs", {"return_attention_mask": True})
        return dict(self._applied(turns, tokenize=True, return_dict=True, **options))

    def _marked(self) -> list[int] | None:
        """Return 1 for the tokens that the template marks; None where the tokenizer's offsets have gaps.

        transformers finds the marked tokens by their characters. At a character without a token, such as a
        blank that the offsets leave out, it silently marks nothing, or all the rest.
        """
        options = {"return_offsets_mapping": True}
        encoded = self._rendered(self.turns, return_assistant_tokens_mask=True, tokenizer_kwargs=options)
        offsets = [(0, 0), *encoded["offset_mapping"]]
        has_gaps = any(after[0] > before[1] for before, after in itertools.pairwise(offsets))
        return None if has_gaps else encoded["assistant_masks"]

    def _span(self, turn: int, ids: list[int]) -> slice:
        """Return where the tokens of an answer stand: between the prompt for it and the end of its turn."""
        if turn == 0:
            raise DataError(
                f"Row {self.row} starts with an answer, and the chat template does not mark answers with "
                "{% generation %}: there is no prompt to tell it from. Put a user turn before it."
            )
        prompt = self._rendered(self.turns[:turn], add_generation_prompt=True)["input_ids"]
        through = self._rendered(self.turns[: turn + 1])["input_ids"]
        if ids[: len(through)] != through or through[: len(prompt)] != prompt:
            raise DataError(
                f"Row {self.row}: with this chat template the tokens up to turn {turn + 1} change when the answer "
                "or later turns follow, so the answer's tokens cannot be told from the rest. Set a "
                "tokenizer.chat_template with {% generation %} around the answers, or give rows of one "
                "question and one answer."
            )
        return slice(len(prompt), len(through))
