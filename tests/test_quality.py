"""The grid of results: which runs it asks for, what it concludes from them, that the page says so, one real run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import deep
import deep_page
import performance_page
import quality_page
import quality_runs
import saved_models
from quality_runs import Key, Results, Runs
from quality_training import Bench

ROOT = Path(__file__).parent.parent
GRID: dict[str, Any] = {
    "settings": {"head_warmup": 2, "start_batches": 2},
    "tasks": {name: {"steps": 10} for name in ("easy", "hard")},
    "modules": {"qv": ["query", "value"]},
    "sweep": {"tasks": ["easy"], "seeds": [0]},
    "mean": ["easy", "hard"],
    "comparisons": [["qv", "cores", "peft_lora"]],
    "runs": [{"modules": "qv", "tasks": ["easy", "hard"], "seeds": 3, "methods": ["cores", "peft_lora"]}],
    "methods": {
        "cores": {"fields": {"method": "lotr"}, "rates": [{"lr": 0.1}, {"lr": 0.2}]},
        "peft_lora": {"peft": "LoraConfig", "fields": {}, "rates": [{"lr": 0.3, "core_lr": 0.1}]},
    },
}


def _line(key: Key, dev: float, test: float) -> dict[str, Any]:
    numbers = 100 if key.name == "cores" else 1000
    rest = {"method": key.name, "init": "", "rank": 1, "numbers": numbers, "steps": 10}
    return {**key._asdict(), **rest, "dev": dev, "test": test}


def _all_done() -> Runs:
    """Run the whole grid with made-up scores: the second rate is better on dev and worse on test."""
    runs: Runs = {}
    for _ in range(2):
        for wish in list(quality_runs.wanted(GRID, runs)):
            if wish is not None and wish[0] not in runs:
                key, better = wish[0], wish[0].rates == "lr=0.2"
                score = 0.6 + 0.01 * key.seed + (0.1 if key.name == "peft_lora" else 0.0)
                runs[key] = _line(key, score + 0.1 * better, score - 0.2 * better)
    return runs


def test_results_wait_for_the_sweep_and_go_on_with_the_rate_that_is_best_on_dev() -> None:
    fresh = list(quality_runs.wanted(GRID, {}))
    assert [wish[1]["lr"] for wish in fresh if wish and wish[0].name == "cores"] == [0.1, 0.2]
    assert fresh.count(None) == 6
    runs = _all_done()
    # two trials of the one method and none of the other; six results each, one of which was a trial
    assert len(runs) == 2 + 5 + 6
    assert quality_runs.best_rates(GRID, runs, "qv", "cores") == {"lr": 0.2}
    assert all(wish[0] in runs for wish in quality_runs.wanted(GRID, runs) if wish)


def test_a_run_that_is_in_the_file_is_known_again(tmp_path: Path) -> None:
    runs = _all_done()
    for run in runs.values():
        quality_runs.append(tmp_path / "grid.csv", run)
    assert quality_runs.read(tmp_path / "grid.csv").keys() == runs.keys()


def test_processes_share_the_runs_without_gap_or_overlap() -> None:
    keys = {wish[0] for wish in quality_runs.wanted(GRID, _all_done()) if wish}
    shares = [{key for key in keys if quality_runs.share_of(key, 3) == at} for at in range(3)]
    assert sum(map(len, shares)) == len(set().union(*shares)) == len(keys)


def test_differences_are_taken_within_a_seed_so_what_seeds_share_adds_no_error() -> None:
    results = Results(GRID, _all_done())
    above, by_task = results.above("qv", "cores", "peft_lora")
    assert (above.mean, above.error) == (pytest.approx(-0.3), pytest.approx(0.0, abs=1e-12))
    assert above.freedom == 4 and list(by_task) == ["easy", "hard"]
    score = results.score("qv", "peft_lora", ["easy", "hard"])
    assert score is not None and score.mean == pytest.approx(0.71)
    assert score.error == pytest.approx(0.01 / 6**0.5)
    lines = quality_page.comparisons(results)
    assert lines[-1] == "| cores: 100 | peft_lora: 1,000 | -30.0 ± 0.0 | *below* |"


def test_the_picture_names_each_method_once(tmp_path: Path) -> None:
    point = quality_page.pictures.Point("LoRA", "LoRA", 10, 50.0, 1.0, "PEFT")
    larger = quality_page.pictures.Point("LoRA", "LoRA", 20, 60.0, 1.0, "PEFT")
    named = quality_page._once([larger, point])
    assert [p.label for p in named] == ["LoRA", ""]
    quality_page.pictures.scores({"panel": named}, "accuracy", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def _between_marks(page: Path) -> dict[str, list[str]]:
    sections = re.findall(r"<!-- (\w+) -->\n\n(.*?)\n\n<!-- /\1 -->", page.read_text(), re.DOTALL)
    return {name: text.split("\n") for name, text in sections}


def test_the_tables_of_the_documents_are_those_of_the_data() -> None:
    grid = yaml.safe_load((ROOT / "benchmarks" / "quality.yaml").read_text())
    data = ROOT / "docs" / "data"
    results = Results(grid, quality_runs.read(data / "grid.csv"))
    plan = yaml.safe_load((ROOT / "benchmarks" / "deep.yaml").read_text())
    runs = deep.read(data / "deep.csv")
    for page, tables in deep_page.tables(plan, runs).items():
        assert _between_marks(ROOT / "docs" / page) == tables
    assert _between_marks(ROOT / "docs" / "results_encoder.md") == quality_page.sections(results, data)
    assert _between_marks(ROOT / "docs" / "performance.md") == performance_page.tables(data)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PEFT's LoRA-GA looks at frozen modules
def test_a_run_is_the_same_again_and_a_basis_carries_over(tmp_path: Path) -> None:
    saved_models.save_bert(tmp_path / "bert")
    (tmp_path / "colours").mkdir()
    for seed, name in enumerate(("train", "dev", "test")):
        saved_models.write_colours(tmp_path / "colours" / f"{name}.csv", rows=48, seed=seed)
    task = {"folder": "colours", "max_length": 8, "batch_size": 8, "steps": 30, "test_rows": 40}
    settings = {"head_warmup": 3, "head_lr": 0.03, "warmup": 0.1, "start_batches": 2}
    rates = {"lr": 0.01}
    source = {"task": "colours", "method": "whole", "rates": rates}
    methods = {
        "whole": {"fields": {"method": "lotr", "r": 4, "init": "gradient"}},
        "cores": {"source": source, "fields": {"method": "lotr", "r": 4}},
        "lora": {"peft": "LoraConfig", "fields": {"r": 1, "init_lora_weights": "lora_ga"}},
    }
    grid = {**GRID, "model": str(tmp_path / "bert"), "tasks": {"colours": task}, "settings": settings}
    store = tmp_path / "store"
    store.mkdir()
    whole, again, cores, lora = (
        Bench({**grid, "methods": methods}, tmp_path, store).measure(
            Key("qv", name, "colours", 1, quality_runs.rates_text(rates)), rates
        )
        for name in ("whole", "whole", "cores", "lora")
    )
    assert whole == again
    assert cores["init"] == "basis" and cores["numbers"] == 4 * 4 * 4 < whole["numbers"]
    assert lora["numbers"] == 4 * 2 * 32
    assert min(run["dev"] for run in (whole, cores, lora)) > 0.4  # a guess has a third
