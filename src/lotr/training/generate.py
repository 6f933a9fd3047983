"""What a language model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import DataError


def answers(
    model: Any,  # a transformers model, bare or in PEFT: what generates is not in the type of either
    tokenizer: Any,
    rows: list[dict[str, Any]],
    text: str,
    chats: str | None,
    max_new_tokens: int,
    tick: Callable[[int, int], None] | None,
) -> Iterator[str]:
    """Yield the answer to each row: to its column `text`, or to the last question of the conversation in `chats`."""
    for n, row in enumerate(rows, 1):
        if chats is not None:
            # Arrow gives every turn every key
            turns = [{key: value for key, value in turn.items() if value is not None} for turn in row[chats]]
            asked = turns[: max((i for i, t in enumerate(turns) if t["role"] != "assistant"), default=-1) + 1]
            if not asked:
                raise DataError(f"Row {n} holds only answers; there is nothing to answer to. Drop it.")
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        else:
            inputs = tokenizer(row[text], return_tensors="pt")
        inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
        with torch.inference_mode():
            made = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        yield tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if tick is not None:
            tick(n, len(rows))
