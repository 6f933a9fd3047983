from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lotr.errors import DataError
from lotr.training.data.columns import (
    Columns,
    check_labels,
    guess_task,
    label_names,
    label_values,
    rows_of_task,
)

TURNS = [{"role": "user", "content": "hi"}]


def rows(*labels: object, **columns: list) -> Dataset:
    return Dataset.from_dict({"text": ["a text"] * len(labels), "label": list(labels), **columns})


def declared(names: list[str], *ids: int) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["a text"] * len(ids), "label": list(ids)}, features=features)


def needed(dataset: Dataset, columns: Columns | None = None, task="classification", **options) -> Dataset:
    return rows_of_task(dataset, columns or Columns(), task, "here", **options)


def test_a_missing_column_is_named_with_its_option_and_the_columns_there_are():
    dataset = Dataset.from_dict({"sentence": ["a"], "label": [1]})
    for columns, message in (
        (Columns(), r'no column "text"; its columns are: sentence, label\..*--text\.'),
        (Columns(text="sentence", label="class"), r'no column "class".*--label\.'),
        (Columns(text="sentence", text2="other"), r'no column "other".*--text2 \(the second of a pair\)\.'),
    ):
        with pytest.raises(DataError, match=message):
            needed(dataset, columns)
    assert needed(dataset, Columns(text="sentence", label="class"), need_label=False)["text"][:] == ["a"]


def test_a_task_gets_the_columns_that_it_needs_under_their_names():
    dataset = rows(1, verdict=["y"], text2=["b"], messages=[TURNS])
    assert needed(dataset).column_names == ["text", "text2", "label"]
    assert needed(dataset, pairs=False, need_label=False).column_names == ["text"]
    assert needed(dataset, Columns(label="verdict"))["label"][:] == ["y"]
    assert needed(dataset, task="causal-lm").column_names == ["messages"]
    assert needed(dataset.rename_column("messages", "talk"), Columns(text="talk"), task="causal-lm")[:] == {
        "messages": [TURNS]
    }


def test_a_column_is_not_text_and_label_at_once():
    with pytest.raises(DataError, match=r'Column "text2" of here is used twice, for --text2 .* and --label'):
        needed(rows(1, text2=["a"]), Columns(label="text2"))


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_missing_texts_are_refused_with_their_rows(missing):
    dataset = Dataset.from_dict({"text": ["a", missing, "c", missing], "label": [1, 0, 1, 0]})
    with pytest.raises(DataError, match=r'Column "text" of here .* 2 of 4 rows do not: 2, 4 '):
        needed(dataset)


@pytest.mark.parametrize(
    "dataset",
    [rows(1, None), rows(1.0, float("nan")), rows("a", ""), rows([1], [2, 3]), declared(["no", "yes"], -1)],
    ids=["none", "nan", "empty", "many", "hidden in a test split of the hub"],
)
def test_missing_or_many_labels_are_refused(dataset):
    with pytest.raises(DataError, match=r'Column "label" of here must hold one label'):
        needed(dataset)


def test_turns_without_a_role_are_refused():
    with pytest.raises(DataError, match=r'Column "messages" .* a list of \{"role"'):
        needed(rows(1, messages=[[{"role": None, "content": "a"}]]), task="causal-lm")


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["pos", "neg"], "classification"),
        ([True, False], "classification"),
        ([0, 1], "classification"),
        ([0.0, 1.0], "classification"),
        (["1", "-2"], "classification"),
        (list(range(64)), "classification"),
        (list(range(65)), "regression"),
        ([0.0, 0.5], "regression"),
        (["1", "2.5"], "regression"),
        (["1e-3", ".5"], "regression"),
        (["01", "2.5"], "classification"),
        (["nan", "1.5"], "classification"),
    ],
)
def test_the_values_of_the_label_tell_the_task_and_texts_are_numbers_only_if_all_are(labels, task):
    assert guess_task(rows(*labels), Columns())[0] == task


def test_without_labels_or_with_conversations_a_language_is_learned():
    for dataset, columns in (
        (Dataset.from_dict({"text": ["a"]}), Columns()),
        (rows(1, messages=[TURNS]), Columns()),
        (Dataset.from_dict({"talk": [TURNS], "label": [1]}), Columns(text="talk")),
    ):
        assert guess_task(dataset, columns)[0] == "causal-lm"
    named = rows(1, 2, messages=[TURNS] * 2, body=["a", "b"])  # a text column passes conversations by
    assert guess_task(named, Columns(text="body"))[0] == "classification"


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
    assert label_names(rows(*labels)) == names


def test_a_class_label_column_keeps_its_names_and_their_order():
    dataset = declared(["no", "maybe", "certainly"], 2, 0)
    assert label_names(needed(dataset)) == ("no", "maybe", "certainly")
    assert label_values(dataset) == ["certainly", "no"]
    assert guess_task(dataset, Columns())[0] == "classification"


def test_labels_that_are_not_known_are_named_with_near_ones():
    with pytest.raises(DataError, match=r"the model does not have: maybe\. Near matches: may"):
        check_labels(rows("may", "maybe"), ("may", "not"), "here", "the model")
