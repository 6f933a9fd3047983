from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from lotr.errors import DataError
from lotr.training.data.readers import read_file

ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(20)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def file(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif suffix in ("csv", "tsv"):
        path.write_text(CSV.replace(",", "," if suffix == "csv" else "\t"))
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    else:
        path.write_text(json.dumps(ROWS, indent=2))
    assert read_file(path).to_list() == ROWS


def test_text_stays_text_however_much_it_looks_like_something_else(tmp_path):
    values = ["NA", "null", "007", "1.50", "nan", "True"]
    source = file(tmp_path, "a.csv", "text,label\n" + "".join(f"{value},0\n" for value in values))
    assert read_file(source)["text"][:] == values


def test_a_text_column_of_numbers_only_stays_text_as_it_was_written(tmp_path):
    source = file(tmp_path, "a.csv", "text,label\n1.50,0\n7,1\n")
    assert read_file(source, strings=["text"])["text"][:] == ["1.50", "7"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["1", "-2"], [1, -2]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1e-3", ".5"], [0.001, 0.5]),
        (["01", "2"], ["01", "2"]),
        (["1", "yes"], ["1", "yes"]),
        (["nan", "1"], ["nan", "1"]),
    ],
)
def test_a_column_becomes_numbers_only_if_all_of_it_is(tmp_path, written, expected):
    source = file(tmp_path, "a.csv", "text,label\n" + "".join(f"t,{value}\n" for value in written))
    labels = read_file(source)["label"][:]
    assert labels == expected
    assert [type(label) for label in labels] == [type(label) for label in expected]


def test_quoted_commas_quotes_and_line_breaks_are_part_of_the_text(tmp_path):
    source = file(tmp_path, "a.csv", '\ufefftext,label\r\n"one, ""two""\nthree",1\r\n')
    assert read_file(source).to_list() == [{"text": 'one, "two"\nthree', "label": 1}]


def test_json_keys_that_the_first_row_lacks_are_kept(tmp_path):
    source = file(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b\u2028c", "label": "x"}\n')
    assert read_file(source).to_list() == [{"text": "a", "label": None}, {"text": "b\u2028c", "label": "x"}]


def test_a_pandas_categorical_in_parquet_is_read_as_its_values(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["no", "yes"])})
    frame.to_parquet(tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet")["label"][:] == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\nb,c,0\n", r"a\.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", "text,label\na\n", r"a\.csv, line 2: 1 fields, but the header has 2"),
        ("a.csv", 'text,label\n"open,1\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", "text,text\na,1\n", r"two columns of one name"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n7\n', r"entry 2 is not an object"),
        ("a.jsonl", '{"label": 1}\n{"label": "x"}\n', r'Column "label" of .*a\.jsonl mixes types'),
        ("a.json", '[\n{"text": "a"},\n{"text"}\n]', r"a\.json, line 3: not JSON"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "\n\n", r"a\.csv is empty"),
        ("a.csv", "text,label\n", r"a\.csv has a header and no rows"),
        ("a.jsonl", "\n", r"a\.jsonl has no rows"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.txt", "text", r'suffix "\.txt"\. Supported: \.csv, \.tsv, \.json, \.jsonl, \.parquet'),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_place(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_file(file(tmp_path, name, content))


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nübel,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8: byte 11"):
        read_file(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_reading_a_file_writes_nothing_into_the_cache_of_datasets(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"rows.{suffix}"
    getattr(Dataset.from_list(ROWS), {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[suffix])(
        path
    )
    assert len(read_file(path)) == len(ROWS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
