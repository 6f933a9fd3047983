"""The benchmark of quality: which runs it asks for, what it concludes from their lines, and one real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import quality_grid
import quality_page
import quality_picture
import quality_report
import saved_models
from quality_run import Bench

GRID = {
    "settings": {"head_warmup": 2, "start_batches": 2, "start_rounds": 1},
    "tasks": {
        name: {"train": name, "steps": 10, "batch_size": 4, "max_length": 8, "test_rows": 9}
        for name in ("easy", "hard")
    },
    "targets": {"qv": ["query", "value"]},
    "sweep": {"tasks": ["easy"], "seeds": [0]},
    "frontier": ["easy", "hard"],
    "compare": [{"target": "qv", "method": "cores", "peer": "lora"}],
    "steps": {"target": "qv", "peer": "lora", "methods": ["cores", "lora"]},
    "waves": [
        {"targets": ["qv"], "tasks": ["easy", "hard"], "seeds": [0, 1, 2], "methods": ["cores", "lora"]}
    ],
    "methods": {
        "cores": {"fields": {"method": "lotr"}, "rates": [{"lr": 0.1}, {"lr": 0.2}]},
        "lora": {"peft": "LoraConfig", "fields": {}, "rates": [{"lr": 0.3}]},
    },
}
NUMBERS = {"cores": 100, "lora": 1000}


def _measured(run: dict, dev: float, test: float) -> dict:
    history = [[5, dev / 2], [10, dev]] if run["seed"] else [[10, dev]]
    return {**run, "numbers": NUMBERS[run["method"]], "dev": dev, "test": test, "history": history}


def _all_done() -> quality_grid.Done:
    """Run the whole grid with made-up scores: the second rate is better on dev and worse on test."""
    done: quality_grid.Done = {}
    for _ in range(2):
        for run in list(quality_grid.runs_of(GRID, done)):
            if run is not None and quality_grid.key_of(run) not in done:
                better = run["rates"] == {"lr": 0.2}
                score = 0.6 + 0.01 * run["seed"] + (0.1 if run["method"] == "lora" else 0.0)
                done |= quality_grid.by_key([_measured(run, score + 0.1 * better, score - 0.2 * better)])
    return done


def test_results_wait_for_the_sweep_and_go_on_with_the_rate_that_is_best_on_dev() -> None:
    fresh = list(quality_grid.runs_of(GRID, {}))
    trials = [run["rates"]["lr"] for run in fresh if run is not None and run["method"] == "cores"]
    assert trials == [0.1, 0.2] and fresh.count(None) == 6
    done = _all_done()
    # two trials of the one method and none of the other; six results each, one of which was a trial
    assert len(done) == 2 + 5 + 6
    assert quality_grid.best_rates(GRID, done, "qv", "cores") == {"lr": 0.2}
    assert all(quality_grid.key_of(run) in done for run in quality_grid.runs_of(GRID, done) if run)


def test_a_line_that_is_there_is_not_run_again(tmp_path: Path) -> None:
    done = _all_done()
    lines = [json.dumps(run, sort_keys=True) for run in done.values()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:5]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[5:]))
    assert quality_grid.read(tmp_path).keys() == done.keys()


def test_processes_share_the_runs_without_gap_or_overlap() -> None:
    runs = [run for run in quality_grid.runs_of(GRID, _all_done()) if run]
    shares = [{quality_grid.key_of(r) for r in runs if quality_grid.share_of(r, 3) == at} for at in range(3)]
    assert sum(map(len, shares)) == len(set().union(*shares)) == len({quality_grid.key_of(r) for r in runs})


def test_differences_are_taken_within_a_seed_so_what_seeds_share_adds_no_error() -> None:
    results = quality_report.Results(GRID, _all_done())
    found, seeds, freedom = results.against("qv", "cores", "lora")
    mean, error = found["all"]
    assert (seeds, freedom) == (3, 4)
    assert mean == pytest.approx(-0.3) and error == pytest.approx(0.0, abs=1e-12)
    cores, lora = results.rows()
    assert (cores["method"], cores["seeds"], lora["numbers"]) == ("cores", 3, 1000)
    assert lora["test"][0] == pytest.approx(0.71) and lora["test"][1] == pytest.approx(0.01 / 6**0.5)


def test_steps_count_until_the_peers_score_is_reached() -> None:
    steps = quality_report.Results(GRID, _all_done()).steps("qv", "cores", "lora")
    assert steps == {"easy": (10, 0), "hard": (10, 0)}


def test_the_frontier_holds_what_beats_everything_smaller() -> None:
    rows = [{"numbers": n, "test": (score, 0.0)} for n, score in ((10, 0.5), (20, 0.4), (30, 0.6), (30, 0.7))]
    assert list(quality_picture.frontier(rows)) == [(10, 0.5), (30, 0.7)]


def test_the_page_says_what_is_lost(tmp_path: Path) -> None:
    quality_page.write(quality_report.Results(GRID, _all_done()), tmp_path / "quality.md")
    page = (tmp_path / "quality.md").read_text()
    assert "| cores | lora | query and value | -30.0 ± 0.0 | below | easy -30.0, hard -30.0 |" in page
    assert "| cores | **LoTR** | 100 | 41.0 ± 0.6 |" in page
    assert (tmp_path / "images" / "quality_qv.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's LoRA-GA looks at frozen modules
def test_a_run_is_the_same_again_and_a_basis_carries_over(tmp_path: Path) -> None:
    saved_models.save_bert(tmp_path / "bert")
    for seed, name in enumerate(("train", "dev", "test")):
        saved_models.write_colours(tmp_path / f"{name}.csv", rows=48, seed=seed)
    files = {name: f"{name}.csv" for name in ("train", "dev", "test")}
    task = {**files, "max_length": 8, "batch_size": 8, "steps": 30, "evaluations": 2, "test_rows": 40}
    settings = {"head_warmup": 3, "head_lr": 0.03, "warmup": 0.1, "start_batches": 2, "start_rounds": 1}
    methods = {
        "whole": {"fields": {"method": "lotr", "r": 4, "init": "gradient"}},
        "cores": {
            "source": {"task": "colours", "method": "whole", "rates": {"lr": 0.01}},
            "fields": {"method": "lotr", "r": 4},
        },
        "lora": {"peft": "LoraConfig", "fields": {"r": 1, "init_lora_weights": "lora_ga"}},
    }
    grid = {**GRID, "model": str(tmp_path / "bert"), "tasks": {"colours": task}}
    grid |= {"settings": settings, "methods": methods, "steps": {"methods": ["whole"]}}
    kept = tmp_path / "kept"
    kept.mkdir()
    run = {"task": "colours", "target": "qv", "seed": 1, "rates": {"lr": 0.01}}
    whole, again, cores, lora = (
        Bench(grid, tmp_path, kept).measure({**run, "method": method})
        for method in ("whole", "whole", "cores", "lora")
    )
    assert (whole["test"], whole["history"]) == (again["test"], again["history"])
    assert [step for step, _ in whole["history"]] == [15, 30] and 0 < whole["kept"] <= 1
    assert cores["numbers"] == 4 * 4 * 4 < whole["numbers"] and lora["numbers"] == 4 * 2 * 32
    assert min(found["dev"] for found in (whole, cores, lora)) > 0.4  # a guess has a third
