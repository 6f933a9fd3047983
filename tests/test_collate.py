from __future__ import annotations

import pickle

import pytest
import torch

from lotr.errors import DataError
from lotr.training.data.encode import collator
from tiny_tokenizers import CLS, EOS, ID, PAD, SEP, bert, ids, language, run, words


def test_a_batch_is_padded_to_its_longest_row_on_the_tokenizers_side():
    encoded = run(bert(), "classification", labels=("0", "1"), text=["a", "b c"], label=[1, 0])
    batch = collator(bert(), "classification")(encoded.to_list())
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["input_ids"].tolist() == [[CLS, ID["a"], SEP, PAD], [CLS, ID["b"], ID["c"], SEP]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())

    tokenizer = bert()
    tokenizer.padding_side = "left"
    assert collator(tokenizer, "classification")(encoded.to_list())["attention_mask"].tolist()[0] == [
        0,
        1,
        1,
        1,
    ]


def test_padding_is_never_learned():
    batch = collator(language(), "causal-lm")(run(language(), text=["a", "b c"]).to_list())
    assert batch["labels"].tolist() == [[ID["a"], EOS, -100], [*ids("b c"), EOS]]


def test_the_end_token_pads_if_there_is_no_padding_token():
    tokenizer = words(eos_token="[EOS]")
    batch = collator(tokenizer, "causal-lm")(run(tokenizer, text=["a", "b c"]).to_list())
    assert batch["input_ids"].tolist() == [[ID["a"], EOS, EOS], [*ids("b c"), EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(DataError, match=r"no padding token and no end-of-text token"):
        collator(words(), "causal-lm")


def test_the_width_can_be_rounded_up():
    batch = collator(language(), "causal-lm", pad_to_multiple_of=8)(
        run(language(), text=["a", "b c"]).to_list()
    )
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)


def test_labels_of_a_regression_are_real_numbers():
    encoded = run(bert(), "regression", text=["a", "b"], label=[1, 2])
    batch = collator(bert(), "regression")(encoded.to_list())
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [1.0, 2.0]


def test_a_collator_makes_the_same_batch_in_another_process():
    rows = run(language(), text=["a", "b c"]).to_list()
    make = collator(language(), "causal-lm")
    copy = pickle.loads(pickle.dumps(make))
    assert all(torch.equal(tensor, copy(rows)[name]) for name, tensor in make(rows).items())
