from __future__ import annotations

import pytest

from data_files import CSV, ROWS, write
from lotr.errors import ConfigError, DataError
from lotr.training.data import load_task, read, rows_of_task

TEXTS = {row["text"] for row in ROWS}


def test_the_built_in_set_is_measured_on_its_test_split(monkeypatch):
    monkeypatch.setattr(
        "lotr.training.data.docstrings.load_docstrings", lambda: {"train": ROWS, "test": ROWS[:4]}
    )
    data = load_task("docstrings")
    assert (len(data.train), len(data.eval), data.eval_source) == (20, 4, 'split "test" of docstrings')
    assert len(rows_of_task(read("docstrings"), data.task)) == 4


def test_a_tenth_is_held_out_by_the_seed_alone_and_no_row_is_lost_or_shared(tmp_path):
    source = write(tmp_path, "a.csv", CSV)
    data, again, other = (load_task(source, seed=seed) for seed in (0, 0, 1))
    train, held_out = set(data.train["text"]), set(data.eval["text"])
    assert len(held_out) == 2 and train | held_out == TEXTS and not train & held_out
    assert "2 of the 20 rows" in data.eval_source and data.eval_source in data.reason
    assert held_out == set(again.eval["text"]) != set(other.eval["text"])


def test_a_label_that_only_a_held_out_row_has_is_still_a_class(tmp_path):
    source = write(tmp_path, "a.csv", "text,label\n" + "".join(f"t{n},{n}\n" for n in range(10)))
    assert load_task(source, task="classification").task.labels == tuple(map(str, range(10)))


def test_train_and_eval_may_write_the_same_class_as_different_types(tmp_path):
    train = write(tmp_path, "a.csv", "text,label\na,0\nb,1\n")
    other = write(tmp_path, "b.jsonl", '{"text": "a", "label": 1}\n')
    data = load_task(train, other)
    assert (data.task.labels, data.eval["label"], data.eval_source) == (("0", "1"), [1], other)


@pytest.mark.parametrize(
    ("train", "other", "options", "message"),
    [
        ("text\nalone\n", None, {}, r"has 1 rows.*--eval"),
        ("text,label\na,3\nb,3\n", None, {}, r'All rows of .*a\.csv have one label, "3"'),
        (
            "text,label\na,1.5\nb,high\n",
            None,
            {"task": "regression"},
            r"a\.csv must .* a number .* row 2 holds 'high'",
        ),
        (CSV, "text,label\nx,1\ny,7\nz,5\n", {}, r"b\.csv has labels that .*a\.csv does not have: 5, 7\."),
        (
            "text,text2,label\na,b,0\nb,c,1\n",
            "text,label\na,0\n",
            {},
            r'Only one of .*a\.csv and .*b\.csv has the column "text2"',
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_source(tmp_path, train, other, options, message):
    eval_source = other and write(tmp_path, "b.csv", other)
    with pytest.raises(DataError, match=message):
        load_task(write(tmp_path, "a.csv", train), eval_source, **options)


def test_texts_and_conversations_are_different_tasks(tmp_path):
    turns = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    chat = write(tmp_path, "chat.jsonl", 2 * turns)
    with pytest.raises(DataError, match=r"Only one of .*chat\.jsonl and .*texts\.csv has conversations"):
        load_task(chat, write(tmp_path, "texts.csv", "text\na\n"), task="causal-lm")


def test_only_classification_has_label_names_and_no_other_task_exists(tmp_path):
    source = write(tmp_path, "a.csv", CSV)
    labels = [load_task(source, task=task).task.labels for task in (None, "regression", "causal-lm")]
    assert labels == [("0", "1"), (), ()]
    with pytest.raises(ConfigError, match=r"Near matches: classification"):
        load_task(source, task="clasification")
