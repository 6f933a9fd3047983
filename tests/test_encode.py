from __future__ import annotations

import pickle

import pytest
import torch

from lotr.errors import DataError
from lotr.training.base_model import load_tokenizer
from lotr.training.data import collator
from tiny_tokenizers import CLS, EOS, ID, PAD, SEP, WORDS, bert, ids, language, run, words


def test_a_class_is_encoded_as_its_place_among_the_labels():
    encoded = run(bert(), "classification", labels=("no", "yes"), text=["a", "b c"], label=["yes", "no"])
    assert encoded["labels"][:] == [1, 0]
    assert encoded["input_ids"][:] == [[CLS, ID["a"], SEP], [CLS, ID["b"], ID["c"], SEP]]
    assert encoded["length"][:] == [3, 4]
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "length"}
    assert "labels" not in run(bert(), "classification", need_label=False, text=["a"]).column_names


def test_a_second_text_is_the_second_segment():
    encoded = run(bert(), "classification", labels=("0", "1"), text=["a"], text2=["b"], label=[1])
    assert encoded[0]["input_ids"] == [CLS, ID["a"], SEP, ID["b"], SEP]
    assert encoded[0]["token_type_ids"] == [0, 0, 0, 1, 1]


def test_texts_are_cut_to_the_longest_allowed():
    encoded = run(bert(), "classification", max_length=4, labels=("0",), text=["a b c d e"], label=[0])
    assert encoded[0]["input_ids"] == [CLS, ID["a"], ID["b"], SEP]


@pytest.mark.parametrize("labels", [[1, 0], ["1", "0"]])
def test_labels_of_a_regression_are_real_numbers(labels):
    encoded = run(bert(), "regression", text=["a", "b"], label=labels)
    batch = collator(bert(), "regression")(encoded.to_list())
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [1.0, 0.0]


def test_more_rows_than_a_batch_keep_their_order_and_labels(capsys):
    n_rows = 2300
    rows = {"text": [WORDS[9 + n % 7] for n in range(n_rows)], "label": [n % 7 for n in range(n_rows)]}
    encoded = run(language(), "classification", labels=tuple("0123456"), **rows)
    assert encoded["labels"][:] == rows["label"]
    assert [row[0] for row in encoded["input_ids"][:]] == [9 + n % 7 for n in range(n_rows)]
    assert capsys.readouterr() == ("", "")


def test_every_token_of_a_plain_text_and_its_end_are_learned_but_no_end_behind_a_cut():
    encoded = run(language(), max_length=3, text=["a [EOS]", "a b c d", "a b c", "a b"])
    assert encoded["input_ids"][:] == [[ID["a"], EOS], ids("a b c"), ids("a b c"), [*ids("a b"), EOS]]
    assert encoded["labels"][:] == encoded["input_ids"][:]
    assert encoded[3]["attention_mask"] == [1, 1, 1]
    assert run(words(), text=["a b"])[0]["input_ids"] == ids("a b")  # a tokenizer without an end token


def test_a_single_token_teaches_nothing_and_is_dropped_with_its_count():
    with pytest.warns(UserWarning, match=r"1 of 2 rows have no token to learn within 64 tokens"):
        assert len(run(words(), text=["a", "a b"])) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_to_its_longest_row_on_the_tokenizers_side(side):
    encoded = run(bert(), "classification", labels=("0", "1"), text=["a", "b c"], label=[1, 0])
    tokenizer = bert()
    tokenizer.padding_side = side
    batch = collator(tokenizer, "classification")(encoded.to_list())
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    short, padding = [CLS, ID["a"], SEP], [PAD]
    rows = [short + padding if side == "right" else padding + short, [CLS, ID["b"], ID["c"], SEP]]
    assert batch["input_ids"].tolist() == rows
    assert batch["attention_mask"].tolist() == [[int(token != PAD) for token in row] for row in rows]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_is_never_learned_here_or_in_another_process():
    make, rows = collator(language(), "causal-lm"), run(language(), text=["a", "b c"]).to_list()
    for collate in (make, pickle.loads(pickle.dumps(make))):
        assert collate(rows)["labels"].tolist() == [[ID["a"], EOS, -100], [*ids("b c"), EOS]]


def test_the_end_token_pads_if_there_is_no_padding_token(tmp_path):
    words(eos_token="[EOS]").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = load_tokenizer(str(tmp_path))
    batch = collator(tokenizer, "causal-lm")(run(tokenizer, text=["a", "b c"]).to_list())
    assert batch["input_ids"].tolist() == [[ID["a"], EOS, EOS], [*ids("b c"), EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(DataError, match=r"no padding token and no end-of-text token"):
        collator(words(), "causal-lm")
