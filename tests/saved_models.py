"""Small models saved to folders, for what starts from a path: the command line and the training run."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3NextForCausalLM,
)

COLOURS = ("red", "green", "blue")
FILLERS = ("a", "the", "very", "old", "thing", "is", "was", "here")
WORDS = (*COLOURS, *FILLERS, "and", "not", "user", "assistant", "what", "colour", "?", ".")


def word_tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    words = [*special.values(), *WORDS]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save_bert(folder: Path, seed: int = 0, layers: int = 2, dropout: float = 0.1) -> str:
    """An encoder of two layers, 32 wide, without a head."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path, seed: int = 0) -> str:
    """A language model with grouped-query attention and a chat template."""
    return _save_decoder(folder, LlamaForCausalLM, seed)


def save_mixtral(folder: Path, seed: int = 0) -> str:
    """The same with four experts in the place of each block's linear modules."""
    return _save_decoder(folder, MixtralForCausalLM, seed, num_local_experts=4)


def save_hybrid(folder: Path, kind: str) -> str:
    """One whose first layer, a convolution or linear attention, keeps neither keys nor values."""
    if kind == "lfm2":
        return _save_decoder(folder, Lfm2ForCausalLM, 0, layer_types=["conv", "full_attention"])
    heads = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    heads |= {f"linear_{name}_head_dim": 8 for name in ("key", "value")} | {"head_dim": 8}
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    return _save_decoder(folder, Qwen3NextForCausalLM, 0, **heads, **experts, **layers)


def _save_decoder(folder: Path, cls: Any, seed: int, **fields: Any) -> str:
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    config = cls.config_class(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # the frozen embeddings have to be large enough for a frozen output layer to say anything
        initializer_range=0.3,
        **fields,
    )
    cls(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_colours(path: Path, rows: int = 96, seed: int = 0, labels: tuple[str, ...] = COLOURS) -> str:
    """A task that two layers learn: name the colour in the text."""
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["text", "label"])
        writer.writeheader()
        for n in range(rows):
            colour = labels[n % len(labels)]
            words = [draw.choice(FILLERS) for _ in range(draw.randint(2, 7))]
            words.insert(draw.randrange(len(words)), colour)
            writer.writerow({"text": " ".join(words), "label": colour})
    return str(path)
