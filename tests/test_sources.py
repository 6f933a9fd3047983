from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from lotr.errors import DataError
from lotr.training.data.load import load_task
from lotr.training.data.sources import read

ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(20)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


def file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_a_missing_file_is_named_with_its_neighbours(tmp_path, monkeypatch):
    file(tmp_path, "train.csv", CSV)
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / "trian.csv"), "trian.csv", "./trian", f"../{tmp_path.name}/trian"):
        with pytest.raises(DataError, match=r"no file .*trian.*Near matches: train\.csv"):
            read(source)
    for source in ("nowhere/train.csv", "./nowhere/train"):
        with pytest.raises(DataError, match="its folder nowhere does not exist"):
            read(source)


def test_a_saved_folder_gives_its_splits_and_nothing_is_written_into_it(tmp_path):
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS), other=Dataset.from_list(ROWS[:3])).save_to_disk(folder)
    before = sorted(folder.rglob("*"))
    assert read(str(folder)).to_list() == ROWS
    assert len(read(str(folder), "other")) == 3
    data = load_task(str(folder))
    assert sorted(data.train["text"][:] + data.eval["text"][:]) == sorted(row["text"] for row in ROWS)
    assert sorted(folder.rglob("*")) == before


def test_a_saved_single_dataset_is_its_own_train_split(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved")).to_list() == ROWS


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(DataError, match=r'no split "dev"\. Its splits: train'):
        read(file(tmp_path, "a.csv", CSV), "dev")


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
    assert read(source).to_list() == ROWS
    assert load_task(source).eval_source == f'split "validation" of {source}'


def test_a_hub_that_does_not_answer_is_a_data_error(monkeypatch):
    def load_dataset(*asked: str) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r'"glue/sst2" is no file.*no route to the hub.*\.csv.*docstrings'):
        read("glue/sst2")
