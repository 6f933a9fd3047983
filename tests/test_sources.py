from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from data_files import CSV, ROWS, write
from lotr.errors import DataError
from lotr.training.data import load_task, read


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows_and_fills_no_cache(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        lines = "\n".join(map(json.dumps, ROWS)) + "\n\n"
        texts = {
            "csv": CSV,
            "tsv": CSV.replace(",", "\t"),
            "jsonl": lines,
            "json": json.dumps(ROWS, indent=2),
        }
        path.write_text(texts[suffix])
    assert read(str(path))[0].to_list() == ROWS
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_text_stays_text_however_much_it_looks_like_something_else(tmp_path):
    values = ["NA", "null", "007", "1.50", "nan", "True", "2020-01-01"]
    for name, content in (
        ("a.csv", "text,id\n" + "".join(f"{value},0\n" for value in values)),
        ("a.jsonl", "\n".join(json.dumps({"text": value}) for value in values)),
    ):
        assert read(write(tmp_path, name, content))[0]["text"][:] == values


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        (
            "a.csv",
            '\ufefftext,label\r\n"one, ""two""\nthree",1\r\n',
            [{"text": 'one, "two"\nthree', "label": "1"}],
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b\u2028c", "label": "x"}\n',
            [{"text": "a", "label": None}, {"text": "b\u2028c", "label": "x"}],
        ),
    ],
    ids=["quotes, commas and line breaks in a field", "keys that the first row lacks"],
)
def test_what_a_format_allows_is_read(tmp_path, name, content, rows):
    assert read(write(tmp_path, name, content))[0].to_list() == rows


def test_a_pandas_categorical_in_parquet_is_read_as_its_values(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["no", "yes"])})
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"))[0]["label"][:] == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\nb,c,0\n", r"a\.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", "text,label\na\n", r"a\.csv, line 2: 1 fields, but the header has 2"),
        ("a.csv", 'text,label\n"open,1\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.csv", 'label,text\n0,"a\n1,b\n', r"a\.csv, line 3: unexpected end of data"),
        ("a.csv", 'label,text\n0,"a\n1,"b\n', r"a\.csv, line 3: ',' expected after"),
        ("a.csv", "text;label\na;1\n", r"a\.csv separates its fields with semicolons"),
        ("a.csv", "text,text\na,1\n", r"two columns of one name"),
        ("a.csv", "text,label\nwell,0\n\udcfcbel,1\n", r"a\.csv, line 3: not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n7\n', r"entry 2 is not an object"),
        ("a.jsonl", '{"label": 1}\n{"label": "x"}\n', r'Column "label" of .*a\.jsonl mixes types.*row 2'),
        ("a.json", '[\n{"text": "a"},\n{"text"}\n]', r"a\.json, line 3: not JSON"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "\n\n", r"a\.csv has no rows\."),
        ("a.csv", "text,label\n", r"a\.csv has no rows under its header"),
        ("a.jsonl", "\n", r"a\.jsonl has no rows"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.txt", "text", r'suffix "\.txt"\. Supported: \.csv, \.tsv, \.json, \.jsonl, \.parquet'),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=message):
        read(str(tmp_path / name))


def test_a_missing_file_is_named_with_its_neighbours(tmp_path, monkeypatch):
    write(tmp_path, "train.csv", CSV)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "trian.csv"), "trian.csv", "./trian", f"../{tmp_path.name}/trian"):
        with pytest.raises(DataError, match=r"no file .*trian.*Near matches: train\.csv"):
            read(source)
    for source in ("nowhere/train.csv", "./nowhere/train"):
        with pytest.raises(DataError, match="its folder nowhere does not exist"):
            read(source)
    with pytest.raises(DataError, match=r"not written by save_to_disk\. Name one of its files: train\.csv"):
        read(str(tmp_path))


def test_a_saved_folder_is_held_out_by_its_splits_and_nothing_is_written_into_it(tmp_path):
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:3])).save_to_disk(folder)
    before = sorted(folder.rglob("*"))
    assert read(str(folder))[0].to_list() == ROWS[:3]
    data = load_task(str(folder))
    assert (data.train.to_list(), data.eval.to_list()) == (ROWS, ROWS[:3])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("saved", [Dataset.from_list(ROWS), DatasetDict(validation=Dataset.from_list(ROWS))])
def test_the_only_split_is_learned_and_a_part_of_it_held_out(tmp_path, saved):
    saved.save_to_disk(tmp_path / "saved")
    data = load_task(str(tmp_path / "saved"))
    assert sorted(data.train["text"][:] + data.eval["text"][:]) == sorted(row["text"] for row in ROWS)
    assert read(str(tmp_path / "saved"))[0].to_list() == ROWS


def hub(monkeypatch, name: tuple[str, ...], **splits: Dataset) -> None:
    """Put one data set on the hub."""

    def load_dataset(*asked: str) -> DatasetDict:
        if asked != name:
            raise ConnectionError(f"no route to {asked}")
        return DatasetDict(splits)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("imdb", ("imdb",)),
        ("owner/set", ("owner/set",)),
        ("glue/sst2", ("glue", "sst2")),
        ("a/b/c", ("a/b", "c")),
    ],
)
def test_a_hub_name_may_have_an_owner_and_a_configuration(monkeypatch, source, name):
    hub(monkeypatch, name, train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:4]))
    data = load_task(source)
    assert (data.train.to_list(), data.eval.to_list()) == (ROWS, ROWS[:4])
    assert data.eval_source == f'split "validation" of {source}'


def test_a_hub_that_does_not_answer_or_lacks_the_split_is_a_data_error(monkeypatch):
    some, none = Dataset.from_list(ROWS), Dataset.from_dict({"text": []})
    hub(monkeypatch, ("imdb",), other=some, more=some)
    with pytest.raises(DataError, match=r'no split "train"\. Its splits: other, more'):
        load_task("imdb")
    hub(monkeypatch, ("imdb",), train=none, more=some)
    with pytest.raises(DataError, match=r'Split "train" of imdb has no rows'):
        load_task("imdb")
    with pytest.raises(DataError, match=r'"glue/sst2" is no file.*no route to .*\.csv.*docstrings'):
        read("glue/sst2")
