from __future__ import annotations

import re
from pathlib import Path

import pytest

from lotr.errors import DataError
from lotr.training.data.docstrings import MARK, load_docstrings, load_functions


def write(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return root


def functions(*docstrings: str) -> str:
    return "\n".join(f'def f{index}():\n    """{text}"""\n' for index, text in enumerate(docstrings))


def texts(root: Path) -> dict[str, str]:
    rows = load_docstrings(root)
    return {row["text"]: row["label"] for row in rows["train"] + rows["test"]}


OTHER = {"other.py": functions("Something else that nobody has said before.")}


def test_the_standard_library_gives_thousands_of_rows_of_sixteen_labels_without_their_names():
    standard_library = load_docstrings()
    train, test = standard_library["train"], standard_library["test"]
    assert {row["label"] for row in train} == {row["label"] for row in test}
    assert len({row["label"] for row in train}) == 16
    assert {row["kind"] for row in train} == {"module", "class", "function", "async function"}
    assert len(train + test) > 2000
    assert 0.17 < len(test) / len(train + test) < 0.23
    assert len({row["text"].casefold() for row in train + test}) == len(train + test)  # none occurs twice
    for row in train + test:
        assert 30 <= len(row["text"]) <= 400
        assert row["text"] == " ".join(row["text"].split())
        for name in (row["label"], row["module"].split(".")[-1]):
            assert not re.search(rf"\b{re.escape(name)}\b", row["text"], re.IGNORECASE), row


def test_the_split_of_a_text_depends_on_nothing_but_the_text(tmp_path):
    sentences = [f"Sentence number {n} is long enough to be taken." for n in range(40)]
    one = load_docstrings(write(tmp_path / "one", {"a.py": functions(*sentences), **OTHER}))
    two = load_docstrings(write(tmp_path / "two", {"z.py": functions(*sentences[::-1]), **OTHER}))
    assert load_docstrings(tmp_path / "one") == one  # in the same order, too
    for rows in (one, two):
        # written down, since Python's own hash differs from process to process
        tested = {row["text"] for row in rows["test"] if row["label"] != "other"}
        assert tested == {sentences[n] for n in [11, 15, 25, 27, 29]}


def test_names_are_masked_and_what_two_packages_claim_or_python_does_not_read_is_left_out(tmp_path):
    folders = ("test", "pack/tests", "idlelib/idle_test", "site-packages/x", "__pycache__")
    shared = functions("Return the number of the things.", "RETURN the number of THINGS here.")
    files = {
        "pack/mail.py": functions("Use Mail.parse or pack.mail, not mailbox or email, of the PACK."),
        "a.py": shared,
        "b.py": shared.lower() + functions("Only this file says this sentence here."),
        "_pydecimal.py": functions("Round the Decimal to some fixed exponent."),  # goes by the public name
        "decimal.py": "",
        **{f"{folder}/hidden.py": functions("This must not be read by anyone.") for folder in folders},
        "broken.py": "def (",
        "escape.py": functions(r"An invalid \d in a docstring gives no warning."),
        "__init__.py": "",
        **OTHER,
    }
    (tmp_path / "binary.py").write_bytes(b"\x00\xff\xfe")
    assert texts(write(tmp_path, files)) == {
        f"Use {MARK}.parse or {MARK}.{MARK}, not mailbox or email, of the {MARK}.": "pack",
        "Only this file says this sentence here.": "b",
        f"Round the {MARK} to some fixed exponent.": "decimal",
        r"An invalid \d in a docstring gives no warning.": "escape",
        "Something else that nobody has said before.": "other",
    }


def test_a_folder_without_sources_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(DataError, match=r"two packages or more.*0 with usable docstrings.*file of your own"):
        load_docstrings(tmp_path)
    with pytest.raises(DataError, match="0 with usable"):
        load_docstrings(tmp_path / "missing")


def test_functions_come_with_their_names_and_no_text_twice(tmp_path):
    source = functions("Return the first of all values.", "Return the first of all values.", "short")
    rows = load_functions(write(tmp_path, {"a.py": f'"""What the module says of itself."""\n{source}'}))
    assert rows["train"] + rows["test"] == [{"prompt": "f0", "completion": "Return the first of all values."}]
