"""Conversations to token ids, with a loss on the assistant's answers only."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from ...errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that takes no part in the loss, as in `torch.nn.CrossEntropyLoss`."""

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Turns = list[dict[str, Any]]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, row: int, max_length: int, with_labels: bool = True
) -> dict[str, list[Any]]:
    """Return the first `max_length` tokens of a conversation in the tokenizer's chat template, and `labels`.

    A template that marks answers with `{% generation %}` says itself what is learned. With any other, the
    tokens of an answer are those between the prompt for it and the end of its turn, which is checked.

    Raises:
        DataError: The tokenizer has no chat template, the template refuses the conversation, or the answers
            cannot be told from the rest. The message names the `row`.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template, so "
            "conversations cannot be encoded. Use an instruction-tuned model, set tokenizer.chat_template, "
            "or give plain texts and name their column with --text."
        ) from error
    turns = without_empty_keys(turns)
    encoded = _render(tokenizer, turns, row)
    if with_labels:
        # slow tokenizers do not know which token a character went to
        is_marked = tokenizer.is_fast and GENERATION_TAG.search(template)
        mask = _answers_marked(tokenizer, turns, row) if is_marked else None
        ids = encoded["input_ids"]
        mask = mask or _answers_between_prompts(tokenizer, turns, row, ids)
        encoded["labels"] = [token if taught else IGNORED for token, taught in zip(ids, mask, strict=True)]
    return {name: values[:max_length] for name, values in encoded.items()}


def without_empty_keys(turns: Turns) -> Turns:
    """Return turns with the keys that each had in its file; Arrow gives every turn every key."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, row: int, **options: Any
) -> dict[str, list[Any]]:
    from jinja2 import TemplateError

    options.setdefault("tokenizer_kwargs", {"return_attention_mask": True})
    try:
        encoded: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
        return dict(encoded)
    except TemplateError as error:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise DataError(
            f"Row {row}: the chat template refuses this conversation ({error}). Its roles are: {roles}. "
            "Mend or drop the row."
        ) from error


def _answers_marked(tokenizer: PreTrainedTokenizerBase, turns: Turns, row: int) -> list[int] | None:
    """Return 1 for the tokens that the template marks; None where the tokenizer's offsets have gaps.

    transformers finds the marked tokens by their characters. At a character without a token, such as a
    blank that the offsets leave out, it silently marks nothing, or all the rest.
    """
    options = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
    encoded = _render(tokenizer, turns, row, **options)
    offsets = [(0, 0), *encoded["offset_mapping"]]
    has_gaps = any(after[0] > before[1] for before, after in itertools.pairwise(offsets))
    return None if has_gaps else encoded["assistant_masks"]


def _answers_between_prompts(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, row: int, ids: list[int]
) -> list[int]:
    mask = [0] * len(ids)
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if index == 0:
            raise DataError(
                f"Row {row} starts with an answer, and the chat template does not mark answers with "
                "{% generation %}: there is no prompt to tell it from. Put a user turn before it."
            )
        prompt = _render(tokenizer, turns[:index], row, add_generation_prompt=True)["input_ids"]
        through = _render(tokenizer, turns[: index + 1], row)["input_ids"]
        if ids[: len(through)] != through or through[: len(prompt)] != prompt:
            raise DataError(
                f"Row {row}: with this chat template the tokens up to turn {index + 1} change when the answer "
                "or later turns follow, so the answer's tokens cannot be told from the rest. Set a "
                "tokenizer.chat_template with {% generation %} around the answers, or give rows of one "
                "question and one answer."
            )
        mask[len(prompt) : len(through)] = [1] * (len(through) - len(prompt))
    return mask
