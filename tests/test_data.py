from __future__ import annotations

from pathlib import Path

import pytest

from lotr.errors import ConfigError, DataError
from lotr.training.data import Columns, load_rows, load_task
from lotr.training.data.columns import label_values

ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(20)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_the_built_in_set_is_measured_on_its_test_split(monkeypatch):
    made = {"train": ROWS, "test": ROWS[:4]}
    monkeypatch.setattr("lotr.training.data.docstrings.load_docstrings", lambda: made)
    data = load_task("docstrings")
    assert (len(data.train), len(data.eval), data.eval_source) == (20, 4, 'split "test" of docstrings')
    assert len(load_rows("docstrings", Columns(), data.task, data.labels)) == 4


def test_a_tenth_is_held_out_and_no_row_is_lost_or_shared(tmp_path):
    source = file(tmp_path, "a.csv", CSV)
    data = load_task(source)
    train, held_out = set(data.train["text"][:]), set(data.eval["text"][:])
    assert len(held_out) == 2
    assert train | held_out == {row["text"] for row in ROWS}
    assert not train & held_out
    assert "2 of the 20 rows" in data.eval_source and data.eval_source in data.reason


def test_the_seed_alone_decides_which_rows_are_held_out(tmp_path):
    source = file(tmp_path, "a.csv", CSV)
    held_out = [load_task(source, seed=seed).eval["text"][:] for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_a_label_that_only_a_held_out_row_has_is_still_a_class(tmp_path):
    source = file(tmp_path, "a.csv", "text,label\n" + "".join(f"t{n},{n}\n" for n in range(10)))
    assert load_task(source, task="classification").labels == tuple(map(str, range(10)))


def test_a_task_that_does_not_exist_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"Near matches: classification"):
        load_task(file(tmp_path, "a.csv", CSV), task="clasification")


def test_train_and_eval_may_write_the_same_class_as_different_types(tmp_path):
    train = file(tmp_path, "a.csv", "text,label\na,0\nb,1\n")
    other = file(tmp_path, "b.jsonl", '{"text": "a", "label": "1"}\n')
    data = load_task(train, other)
    assert (data.labels, label_values(data.eval, Columns())) == (("0", "1"), ["1"])
    assert data.eval_source == other


@pytest.mark.parametrize(
    ("train", "other", "options", "message"),
    [
        (CSV, None, {"columns": Columns(label="sentiment")}, r'no column "sentiment"'),
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
    eval_source = other and file(tmp_path, "b.csv", other)
    with pytest.raises(DataError, match=message):
        load_task(file(tmp_path, "a.csv", train), eval_source, **options)


def test_only_classification_has_label_names(tmp_path):
    source = file(tmp_path, "a.csv", CSV)
    assert load_task(source).labels == ("0", "1")
    assert load_task(source, task="regression").labels == ()
    assert load_task(source, task="causal-lm").labels == ()


def test_an_adapter_refuses_labels_that_it_does_not_know(tmp_path):
    source = file(tmp_path, "a.csv", CSV)
    with pytest.raises(DataError, match=r"labels that the adapter does not have: 1\."):
        load_rows(source, Columns(), "classification", ("0", "2"))


def test_prediction_needs_no_labels(tmp_path):
    source = file(tmp_path, "a.csv", "text\nx\n")
    with pytest.raises(DataError, match="--label"):
        load_rows(source, Columns(), "classification", ("0", "1"))
    assert load_rows(source, Columns(), "classification", ("0", "1"), need_label=False).to_list() == [
        {"text": "x"}
    ]
