"""What the page of methods says of the default is what the runs say that it was written from."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from lotr import METHODS

RECORD = Path(__file__).parent.parent / "docs" / "data" / "methods.json"
RUNS = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
SCORES = {
    method: {run["seed"]: run["accuracy"] for run in RUNS if run["method"] == method}
    for method in {run["method"] for run in RUNS}
}
SIZES = {run["method"]: run["trained_numbers"] for run in RUNS}


def test_every_row_was_run_and_no_run_twice() -> None:
    assert set(METHODS) <= set(SCORES)
    assert len({(run["method"], run["seed"], run["epochs"]) for run in RUNS}) == len(RUNS)


def test_the_default_is_as_near_to_lora_and_above_smaller_rows_as_the_page_says() -> None:
    score = mean(SCORES["lotr"].values())
    assert len(SCORES["lotr"]) == len(SCORES["lotr as published"]) == 3
    assert 4 < SIZES["peft_lora"] / SIZES["lotr"] < 6
    assert 0 < mean(SCORES["peft_lora"].values()) - score < 0.02
    assert 0.045 < score - mean(SCORES["lotr as published"].values()) < 0.06
    for method in METHODS:
        if SIZES[method] < SIZES["lotr"]:  # over the seeds that both have, and over all
            paired = mean(SCORES[method][seed] - SCORES["lotr"][seed] for seed in SCORES[method])
            assert paired <= 0 and mean(SCORES[method].values()) <= score, method
