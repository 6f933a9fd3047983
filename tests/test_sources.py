from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from data_files import CSV, ROWS, write
from lotr.errors import DataError
from lotr.training.data import Columns, load_task, read

TEXTS = [row["text"] for row in ROWS]


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
    assert read(str(path)).rows() == ROWS
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_text_stays_text_however_much_it_looks_like_something_else(tmp_path):
    values = ["NA", "null", "007", "1.50", "nan", "True", "2020-01-01"]
    for name, content in (
        ("a.csv", "text,id\n" + "".join(f"{value},0\n" for value in values)),
        ("a.jsonl", "\n".join(json.dumps({"text": value}) for value in values)),
    ):
        assert list(read(write(tmp_path, name, content))["text"]) == values


TWO = [{"text": "a, b", "label": "1,5"}, {"text": "c", "label": "2"}]


PEOPLE = {
    "quotes and line breaks in fields": (
        "a.csv",
        '\ufefftext,label\r\n"one, ""two""\nthree",1\r\n',
        [{"text": 'one, "two"\nthree', "label": "1"}],
    ),
    "semicolons": ("a.csv", "text;label\na, b;1,5\nc;2\n", TWO),
    "a first line that names the separator": ("a.csv", "sep=|\ntext|label\na, b|1,5\nc|2\n", TWO),
    "a suffix that promises another": ("a.tsv", 'text;label\n"a, b";1,5\nc;2\n', TWO),
    "spaces around the names of columns": ("a.csv", 'text , label\n"a, b","1,5"\nc,2\n', TWO),
    "one column with separators in its texts": ("a.csv", "text\na; b; c\n", [{"text": "a; b; c"}]),
    "lines": ("a.txt", "a text\r\n\n another, too \n", [{"text": "a text"}, {"text": "another, too"}]),
    "keys that only some rows have": (
        "a.jsonl",
        '{"a": "b\u2028"}\n{"b": 1}\n',
        [{"a": "b\u2028", "b": None}, {"a": None, "b": 1}],
    ),
    "columns as pandas writes them, in any order": (
        "a.json",
        '{"text": {"0": "a", "1": "b"}, "label": {"1": "B", "0": "A"}}',
        [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}],
    ),
    "one object of columns": ("a.json", '{"text": ["a", "b"]}', [{"text": "a"}, {"text": "b"}]),
    "one object around the rows": ("a.json", '{"about": "us", "data": [{"text": "a"}]}', [{"text": "a"}]),
    "one object a line": ("a.json", '{"text": "a"}\n\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
}


@pytest.mark.parametrize(("name", "content", "rows"), PEOPLE.values(), ids=PEOPLE)
def test_what_people_have_is_read(tmp_path, name, content, rows):
    assert read(write(tmp_path, name, content)).rows() == rows


def test_the_encoding_of_excel_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("übel\nwohl\n".encode("utf-16"))
    assert read(str(tmp_path / "a.txt"))["text"] == ["übel", "wohl"]


def test_a_field_may_be_longer_than_128_kib(tmp_path):
    source = write(tmp_path, "a.csv", f"text,label\n{'long ' * 100_000},1\nshort,0\n")
    assert [len(text) for text in read(source)["text"]] == [500_000, 5]


def test_a_file_with_100_000_columns_is_read(tmp_path):
    """With Arrow's columns this takes minutes."""
    names, values = (",".join(f"{word}{n}" for n in range(100_000)) for word in ("column", ""))
    source = write(tmp_path, "a.csv", f"text,label,{names}\n" + f"a,1,{values}\nb,0,{values}\n" * 5)
    assert load_task(source).task.labels == ("0", "1")
    with pytest.raises(DataError, match=r'no column "body"; its columns are: text, .* … \(100,002 in all\)'):
        load_task(source, columns=Columns(text="body"))


def test_a_folder_of_files_is_split_by_their_names(tmp_path):
    for name, rows in (("train", 6), ("dev", 2), ("test", 4)):
        write(tmp_path, f"{name}.csv", "text,label\n" + "a,1\nb,0\n" * (rows // 2))
    write(tmp_path, "sample_submission.csv", "id\n1\n")
    data = load_task(str(tmp_path))
    assert (len(data.train), len(data.eval), data.eval_source) == (6, 2, f'split "dev" of {tmp_path}')
    assert len(read(str(tmp_path))) == 2
    write(tmp_path, "train-2.csv", CSV)
    with pytest.raises(DataError, match=r"two files for its split train, train-2\.csv and train\.csv"):
        load_task(str(tmp_path))
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", "mail.csv", CSV)
    with pytest.raises(
        DataError, match=r"no file is called train, dev or test\. Name one of its files: mail\.csv"
    ):
        load_task(str(tmp_path / "other"))


def test_a_pandas_categorical_in_parquet_is_read_as_its_values(tmp_path):
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["no", "yes"])})
    frame.to_parquet(tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"))["label"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\nb,c,0\n", r"a\.csv, line 3: 3 fields, but the header has 2"),
        ("a.csv", "text,label\na\n", r"a\.csv, line 2: 1 fields, but the header has 2"),
        ("a.csv", 'label,text\n0,a\n\n1,"b\n0,c\n', r"a\.csv, lines 4 to 5: no CSV \(unexpected end of data"),
        ("a.csv", 'label,text\n0,"a\n1,"b\n', r"a\.csv, lines 2 to 3: no CSV .*expected after"),
        ("a.csv", "text,text\na,1\n", r"two columns of one name"),
        ("a.csv", "text,label\nwell,0\n\udcfcbel,1\n", r"a\.csv, line 3: not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n7\n', r"entry 2 is not an object"),
        ("a.json", '[\n{"text": "a"},\n{"text"}\n]', r"a\.json, line 3: not JSON"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read as Parquet"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "\n\n", r"a\.csv has no rows\."),
        ("a.csv", "text,label\n", r"a\.csv has no rows under its header"),
        ("a.jsonl", "\n", r"a\.jsonl has no rows"),
        ("a.json", "null", r"a\.json has no rows|holds neither"),
        ("a.json", '{"text": {"0": "a"}, "label": {"1": "x"}}', "column 'label' has other rows than 'text'"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.xlsx", "text", r'suffix "\.xlsx"\. Supported: \.csv, \.tsv, \.json, \.jsonl, \.parquet, \.txt'),
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


def test_a_saved_folder_is_held_out_by_its_splits_and_nothing_is_written_into_it(tmp_path):
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:3])).save_to_disk(folder)
    before = sorted(folder.rglob("*"))
    assert read(str(folder)).rows() == ROWS[:3]
    data = load_task(str(folder))
    assert (data.train["text"], data.eval["text"]) == (TEXTS, TEXTS[:3])
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("saved", [Dataset.from_list(ROWS), DatasetDict(validation=Dataset.from_list(ROWS))])
def test_the_only_split_is_learned_and_a_part_of_it_held_out(tmp_path, saved):
    saved.save_to_disk(tmp_path / "saved")
    data = load_task(str(tmp_path / "saved"))
    assert sorted(data.train["text"] + data.eval["text"]) == sorted(TEXTS)
    assert read(str(tmp_path / "saved")).rows() == ROWS


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
    assert (data.train["text"], data.eval["text"]) == (TEXTS, TEXTS[:4])
    assert data.eval_source == f'split "validation" of {source}'


def test_a_hub_that_does_not_answer_or_lacks_the_split_is_a_data_error(monkeypatch):
    some, none = Dataset.from_list(ROWS), Dataset.from_dict({"text": []})
    hub(monkeypatch, ("imdb",), other=some, more=some)
    with pytest.raises(DataError, match=r'no split "train"\. Its splits: other, more'):
        load_task("imdb")
    hub(monkeypatch, ("imdb",), train=none, more=some)
    with pytest.raises(DataError, match=r'nothing to read: split "train" of imdb has no rows'):
        load_task("imdb")
    with pytest.raises(DataError, match=r'"glue/sst2" is no file.*no route to .*\.csv.*docstrings'):
        read("glue/sst2")
