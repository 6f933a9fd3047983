from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from lotr.errors import DataError
from lotr.training.data import load_task, read

ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(20)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def rows_of(source: str | Path, label: str | None = "label") -> Dataset:
    return read(str(source), label)[0]


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
    assert rows_of(path).to_list() == ROWS


def test_text_stays_text_however_much_it_looks_like_something_else(tmp_path):
    values = ["NA", "null", "007", "1.50", "nan", "True"]
    source = file(tmp_path, "a.csv", "text,label\n" + "".join(f"{value},0\n" for value in values))
    assert rows_of(source)["text"][:] == values


def test_only_the_label_becomes_numbers(tmp_path):
    source = file(tmp_path, "a.csv", "text,label,id\n1.50,0,007\n7,1,12\n")
    assert rows_of(source).to_list() == [
        {"text": "1.50", "label": 0, "id": "007"},
        {"text": "7", "label": 1, "id": "12"},
    ]
    assert rows_of(source, label=None)["label"][:] == ["0", "1"]


def test_dates_in_json_stay_text(tmp_path):
    assert rows_of(file(tmp_path, "a.jsonl", '{"day": "2020-01-01"}'))["day"][:] == ["2020-01-01"]


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
    labels = rows_of(source)["label"][:]
    assert labels == expected
    assert [type(label) for label in labels] == [type(label) for label in expected]


def test_quoted_commas_quotes_and_line_breaks_are_part_of_the_text(tmp_path):
    source = file(tmp_path, "a.csv", '\ufefftext,label\r\n"one, ""two""\nthree",1\r\n')
    assert rows_of(source).to_list() == [{"text": 'one, "two"\nthree', "label": 1}]


def test_json_keys_that_the_first_row_lacks_are_kept(tmp_path):
    source = file(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b\u2028c", "label": "x"}\n')
    assert rows_of(source).to_list() == [{"text": "a", "label": None}, {"text": "b\u2028c", "label": "x"}]


def test_a_pandas_categorical_in_parquet_is_read_as_its_values(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["no", "yes"])})
    frame.to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet")["label"][:] == ["no", "yes"]


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
    with pytest.raises(DataError, match=message):
        rows_of(file(tmp_path, name, content))


def test_a_file_that_is_not_utf_8_is_refused_with_the_line(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nwell,0\nübel,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 3: not UTF-8"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_reading_a_file_writes_nothing_into_the_cache_of_datasets(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"rows.{suffix}"
    getattr(Dataset.from_list(ROWS), {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[suffix])(
        path
    )
    assert len(rows_of(path)) == len(ROWS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_is_named_with_its_neighbours(tmp_path, monkeypatch):
    file(tmp_path, "train.csv", CSV)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "trian.csv"), "trian.csv", "./trian", f"../{tmp_path.name}/trian"):
        with pytest.raises(DataError, match=r"no file .*trian.*Near matches: train\.csv"):
            read(source)
    for source in ("nowhere/train.csv", "./nowhere/train"):
        with pytest.raises(DataError, match="its folder nowhere does not exist"):
            read(source)


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


def test_a_missing_or_empty_split_is_refused(monkeypatch):
    splits = {"other": Dataset.from_list(ROWS), "more": Dataset.from_list(ROWS)}
    monkeypatch.setattr("datasets.load_dataset", lambda *name: DatasetDict(splits))
    with pytest.raises(DataError, match=r'no split "train"\. Its splits: other, more'):
        load_task("imdb")
    splits["train"] = Dataset.from_dict({"text": []})
    with pytest.raises(DataError, match=r'Split "train" of imdb has no rows'):
        load_task("imdb")


def test_a_folder_of_files_is_refused_with_their_names(tmp_path):
    file(tmp_path, "train.csv", CSV)
    with pytest.raises(DataError, match=r"not written by save_to_disk\. Name one of its files: train\.csv"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "existing"),
    [
        ("imdb", ("imdb",)),
        ("owner/set", ("owner/set",)),
        ("glue/sst2", ("glue", "sst2")),
        ("a/b/c", ("a/b", "c")),
    ],
)
def test_a_hub_name_may_have_an_owner_and_a_configuration(monkeypatch, source, existing):
    def load_dataset(*asked: str) -> DatasetDict:
        if asked != existing:
            raise FileNotFoundError(f"no {asked}")
        return DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:4]))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = load_task(source)
    assert (data.train.to_list(), data.eval.to_list()) == (ROWS, ROWS[:4])
    assert data.eval_source == f'split "validation" of {source}'


def test_a_hub_that_does_not_answer_is_a_data_error(monkeypatch):
    def load_dataset(*asked: str) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r'"glue/sst2" is no file.*no route to the hub.*\.csv.*docstrings'):
        read("glue/sst2")
