"""`--rank auto --budget N`: ranks from a budget, for one run or a plan, and for a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import CtrlC, quiet, report, settings
from lotr.errors import Interrupted
from lotr.files.adapter_folder import CONFIG, WEIGHTS
from lotr.training.run import train


@pytest.mark.parametrize(
    "more", [{}, {"init": "gradient"}, {"trainable": "cores"}, {"method": "metatt_4d"}], ids=str
)
def test_a_budget_gives_all_groups_the_largest_rank(
    place: Path, tmp_path: Path, more: dict[str, str]
) -> None:
    lines: list[str] = []
    budget = {"rank": "auto", "budget": 700}
    result = train(settings(place, tmp_path, max_steps=1, **budget, **more), say=lines.append)
    words = [str(word) for name, value in (budget | more).items() for word in (f"--{name}", value)]
    planned = report("plan", place / "bert", *words)
    assert planned["trained_numbers"] == result.trained_numbers["adapter"] <= 700
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == int(planned["rank"])
    assert (
        planned["rank_choice"] in lines
        and "largest that trains at most 700 numbers" in planned["rank_choice"]
    )


def test_a_run_that_goes_on_has_the_rank_that_was_chosen(place: Path, tmp_path: Path) -> None:
    chosen = {"rank": "auto", "budget": 700, "init": "gradient", "start_batches": 2}
    straight = train(settings(place, tmp_path / "straight", **chosen), say=quiet)
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path / "stopped", **chosen), say=quiet, callbacks=[CtrlC(4)])
    assert train(output=str(tmp_path / "stopped"), resume=True, say=quiet).rank == straight.rank
    one, two = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("straight", "stopped"))
    assert one == two
