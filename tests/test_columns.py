from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lotr.errors import DataError
from lotr.training.data.columns import Columns, check_rows, guess_task, label_names, label_values


def rows(*labels: object, **columns: list) -> Dataset:
    return Dataset.from_dict({"text": ["a text"] * len(labels), "label": list(labels), **columns})


def check(dataset: Dataset, columns: Columns | None = None, **options) -> None:
    check_rows(dataset, columns or Columns(), options.pop("task", "classification"), "here", **options)


def test_a_missing_column_is_named_with_its_option_and_the_columns_there_are():
    dataset = Dataset.from_dict({"sentence": ["a"], "label": [1]})
    with pytest.raises(DataError, match=r'no column "text"; its columns are: sentence, label\..*--text\.'):
        check(dataset)
    with pytest.raises(DataError, match=r'no column "class".*--label\.'):
        check(dataset, Columns(text="sentence", label="class"))
    check(dataset, Columns(text="sentence", label="class"), need_label=False)


def test_a_second_text_must_exist_only_if_it_was_named():
    check(rows(1))
    with pytest.raises(DataError, match=r'no column "other".*--text2\.'):
        check(rows(1), Columns(text2="other"))


def test_a_column_is_not_text_and_label_at_once():
    with pytest.raises(DataError, match=r'Column "text2" of here is used twice, for --text2 and --label'):
        check(rows(1, text2=["a"]), Columns(label="text2"))


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_missing_texts_are_refused_with_their_rows(missing):
    dataset = Dataset.from_dict({"text": ["a", missing, "c", missing], "label": [1, 0, 1, 0]})
    with pytest.raises(DataError, match=r'Column "text" of here .* 2 of 4 rows do not: 2, 4 '):
        check(dataset)


@pytest.mark.parametrize("labels", [[1, None], [1.0, float("nan")], ["a", ""], [[1], [2, 3]]])
def test_missing_or_many_labels_are_refused(labels):
    with pytest.raises(DataError, match=r'Column "label" of here must hold one label'):
        check(rows(*labels))


def test_hidden_labels_of_a_hub_test_split_are_refused():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    with pytest.raises(DataError, match="must hold one label"):
        check(dataset)


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["pos", "neg"], "classification"),
        ([True, False], "classification"),
        ([0, 1], "classification"),
        ([0.0, 1.0], "classification"),
        (list(range(64)), "classification"),
        (list(range(65)), "regression"),
        ([0.0, 0.5], "regression"),
    ],
)
def test_the_values_of_the_label_tell_the_task(labels, task):
    assert guess_task(rows(*labels), Columns())[0] == task


def test_without_labels_or_with_conversations_a_language_is_learned():
    turns = [[{"role": "user", "content": "hi"}]]
    assert guess_task(Dataset.from_dict({"text": ["a"]}), Columns())[0] == "causal-lm"
    assert guess_task(rows(1, messages=turns), Columns())[0] == "causal-lm"
    assert (
        guess_task(Dataset.from_dict({"talk": turns, "label": [1]}), Columns(text="talk"))[0] == "causal-lm"
    )


def test_naming_a_text_column_passes_the_conversations_by():
    dataset = rows(1, 2, messages=[[{"role": "user", "content": "hi"}]] * 2, body=["a", "b"])
    assert guess_task(dataset, Columns(text="body"))[0] == "classification"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 100], ("9", "10", "100")),
        ([1.0, 0.0], ("0", "1")),
        (["10", "9"], ("9", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
        ([True, False], ("False", "True")),
    ],
)
def test_label_names_are_sorted_as_numbers_if_they_are(labels, names):
    assert label_names(rows(*labels), Columns()) == names


def test_a_class_label_column_keeps_its_names_and_their_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "certainly"])})
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    assert label_names(dataset, Columns()) == ("no", "maybe", "certainly")
    assert label_values(dataset, Columns()) == ["certainly", "no"]
    assert guess_task(dataset, Columns())[0] == "classification"
