"""Tokenizers with a vocabulary of a dozen words, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lotr.training.data import TaskRecord, encode, rows_of_task
from lotr.training.data.tables import Table

WORDS = ["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]", "user", ":", "assistant", "#", *"abcdefg", "tool"]
ID = {word: index for index, word in enumerate(WORDS)}
PAD, EOS, CLS, SEP = (ID[word] for word in WORDS[:1] + WORDS[2:5])


def words(**special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def language(**options: str) -> PreTrainedTokenizerFast:
    return words(pad_token="[PAD]", eos_token="[EOS]", **options)


def bert() -> PreTrainedTokenizerFast:
    tokenizer = words(pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def run(tokenizer, task="causal-lm", max_length=64, labels=(), need_label=True, **rows):
    record = TaskRecord(task, labels, max_length, pairs=None)
    return encode(rows_of_task(Table(rows), record, need_label), tokenizer, record)


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]
