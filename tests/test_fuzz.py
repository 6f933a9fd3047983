"""The short form of `make fuzz`, and the promises of docs/reliability.md beside their tests."""

from __future__ import annotations

import re
from pathlib import Path

import fuzz

TESTS = Path(__file__).parent


def test_mutated_files_are_read_right_or_refused() -> None:
    outcomes, wrong = fuzz.run(504)
    assert wrong == []
    assert all(counts["refused"] > 5 for counts in outcomes.values())


def test_every_test_that_the_page_on_reliability_names_exists() -> None:
    page = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    promises = [
        line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert len(named) == len(promises) > 15
    for file, test in named:
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), (file, test)
