from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from lotr.errors import DataError
from lotr.training.data.docstrings import MARK, load_docstrings


@pytest.fixture(scope="module")
def standard_library() -> dict[str, list[dict[str, str]]]:
    return load_docstrings()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return root


def functions(*docstrings: str) -> str:
    return "\n".join(f'def f{index}():\n    """{text}"""\n' for index, text in enumerate(docstrings))


def texts(root: Path, **options: int) -> dict[str, str]:
    rows = load_docstrings(root, **options)
    return {row["text"]: row["label"] for row in rows["train"] + rows["test"]}


OTHER = {"other.py": functions("Something else that nobody has said before.")}


def test_the_standard_library_gives_sixteen_labels_and_thousands_of_rows_a_fifth_for_the_test(
    standard_library,
):
    train, test = standard_library["train"], standard_library["test"]
    assert {row["label"] for row in train} == {row["label"] for row in test}
    assert len({row["label"] for row in train}) == 16
    assert len(train + test) > 2000
    assert 0.17 < len(test) / len(train + test) < 0.23


def test_no_text_occurs_twice(standard_library):
    counts = Counter(row["text"].casefold() for row in standard_library["train"] + standard_library["test"])
    assert counts.most_common(1)[0][1] == 1


def test_texts_are_one_line_of_thirty_to_four_hundred_characters_without_their_module(standard_library):
    for row in standard_library["train"] + standard_library["test"]:
        assert 30 <= len(row["text"]) <= 400
        assert row["text"] == " ".join(row["text"].split())
        for name in (row["label"], row["module"].split(".")[-1]):
            assert not re.search(rf"\b{re.escape(name)}\b", row["text"], re.IGNORECASE), row


def test_reading_twice_gives_the_same_rows_in_the_same_order(tmp_path):
    root = write(
        tmp_path, {f"m{n}.py": functions(*(f"Text {k} of {n}: {'x' * 30}" for k in range(9))) for n in "ab"}
    )
    assert load_docstrings(root) == load_docstrings(root)


def test_the_split_of_a_text_depends_on_nothing_but_the_text(tmp_path):
    sentences = [f"Sentence number {n} is long enough to be taken." for n in range(40)]
    one = load_docstrings(write(tmp_path / "one", {"a.py": functions(*sentences), **OTHER}))
    two = load_docstrings(write(tmp_path / "two", {"z.py": functions(*sentences[::-1]), **OTHER}))
    for rows in (one, two):
        # written down, since Python's own hash differs from process to process
        found = {row["text"] for row in rows["test"] if row["label"] != "other"}
        assert found == {sentences[n] for n in [11, 15, 25, 27, 29]}


def test_all_four_kinds_are_found_wherever_they_stand(tmp_path):
    source = '''"""The module's own docstring, first paragraph.

    A second paragraph."""
if True:
    class Outer:
        """A class in a branch of a module, and then
        a second line."""
        try:
            def method(self):
                """A function in a try block of a class."""
        except ValueError:
            pass
        else:
            async def later(self):
                """An async function in an else block."""
'''
    rows = load_docstrings(write(tmp_path, {"pack/inner.py": source, **OTHER}))
    found = {row["kind"]: row["text"] for row in rows["train"] + rows["test"] if row["label"] == "pack"}
    assert found == {
        "module": "The module's own docstring, first paragraph.",
        "class": "A class in a branch of a module, and then a second line.",
        "function": "A function in a try block of a class.",
        "async function": "An async function in an else block.",
    }


def test_names_are_masked_as_words_in_any_case_and_in_dotted_names(tmp_path):
    source = functions("Use Mail.parse or pack.mail, not mailbox or email, of the PACK.")
    found = texts(write(tmp_path, {"pack/mail.py": source, **OTHER}))
    assert f"Use {MARK}.parse or {MARK}.{MARK}, not mailbox or email, of the {MARK}." in found


def test_a_text_that_two_packages_claim_is_in_neither(tmp_path):
    shared = functions("Return the number of the things.", "RETURN the number of THINGS here.")
    files = {"a.py": shared, "b.py": shared.lower() + functions("Only b says this sentence here."), **OTHER}
    found = texts(write(tmp_path, files))
    assert set(found.values()) == {"b", "other"}
    assert len(found) == 2


def test_the_python_half_of_a_module_goes_by_the_public_name(tmp_path):
    files = {
        "_pydecimal.py": functions("Round the Decimal to some fixed exponent."),
        "decimal.py": "",
        **OTHER,
    }
    assert texts(write(tmp_path, files))[f"Round the {MARK} to some fixed exponent."] == "decimal"


def test_the_largest_labels_are_kept_and_ties_go_by_name(tmp_path):
    sizes = {"small": 1, "tie_b": 2, "tie_a": 2, "large": 3}
    files = {
        f"{name}.py": functions(*(f"Sentence {n} of the file {name.upper()}X." for n in range(size)))
        for name, size in sizes.items()
    }
    assert set(texts(write(tmp_path, files), packages=2).values()) == {"large", "tie_a"}


@pytest.mark.parametrize(
    "folder", ["test", "pack/tests", "idlelib/idle_test", "site-packages/x", "__pycache__"]
)
def test_tests_and_installed_packages_are_left_out(tmp_path, folder):
    files = {f"{folder}/hidden.py": functions("This must not be read by anyone."), **OTHER}
    files["more.py"] = functions("Another sentence of another file.")
    assert "This must not be read by anyone." not in texts(write(tmp_path, files))


def test_files_that_are_not_python_are_skipped_without_a_warning(tmp_path):
    files = {
        "broken.py": "def (",
        "escape.py": functions(r"An invalid escape \d in a docstring here."),
        **OTHER,
    }
    (tmp_path / "binary.py").write_bytes(b"\x00\xff\xfe")
    assert set(texts(write(tmp_path, files)).values()) == {"escape", "other"}


def test_a_folder_without_sources_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(DataError, match=r"two packages or more.*0 with usable docstrings.*file of your own"):
        load_docstrings(tmp_path)
    with pytest.raises(DataError, match="0 with usable"):
        load_docstrings(tmp_path / "missing")
