"""The page of the docs that `quality.py` writes: everything on it comes from the runs and the grid."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import quality_defaults
import quality_fit
import quality_picture
import quality_report
from quality_report import Estimate, Results, Row

_FAMILIES = {"head": "", "lotr": "**LoTR**", "table": "in the table", "lora": "our start", "peft": "PEFT"}
_TARGETS = {"qv": "Query and value", "all": "All linear layers"}


def write(results: Results, page: Path) -> None:
    """Write the page, and its pictures beside it.

    Args:
        results: See `Results`.
        page: Markdown file; pictures go into `images/`.
    """
    (page.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = ["# What each number buys", "", *_method(results)]
    rows = results.rows()
    for target in results.grid["targets"]:
        mine = [row for row in rows if row["target"] == target]
        if mine:
            lines += _section(results, target, mine, page)
    lines += [*_claims(results), *_steps(results), *_fits(page), *_defaults(page), *_rates(results, rows)]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _method(results: Results) -> list[str]:
    grid = results.grid
    settings, sweep = grid["settings"], grid["sweep"]
    passes = settings["start_rounds"] + 1
    counts = sorted({len(method["rates"]) for method in grid["methods"].values()} - {1})
    lines = [
        "Written by `python benchmarks/quality.py --report --page docs/quality.md` from "
        f"{results.n_runs} runs, which are kept in `benchmarks/results`. What we lose stands beside what we win.",
        "",
        "**How it is measured.** The packaged MiniLM (6 layers, 384 wide), frozen, on a CPU; numbers are float32, and "
        f"products are taken in {settings.get('products', 'float32')} (autocast). A new head is trained alone for "
        f"{settings['head_warmup']} steps, then with the adapter; both are the same for every method, as are the order "
        "of the batches, AdamW, the schedule and the clipping. Runs are short, so the table says what a method learns "
        "quickly. "
        f"A method has {' or '.join(map(str, counts))} rates, all tried on "
        f"{' and '.join(sweep['tasks'])} with seeds {' and '.join(map(str, sweep['seeds']))}; the best mean score on "
        "dev decides for all tasks and seeds, and those seeds count among them. The last table says which rates won, "
        "and which methods (transfers, defaults) have one given rate. Trained numbers are without the head. "
        "Scores are accuracies on test; ± is the standard error over the seeds.",
        "",
        *(f"- {note}" for note in grid.get("notes", ())),
        "",
        f"A start from gradients looks at {settings['start_batches']} batches {passes} times before the first step: "
        f"as much computing as {settings['start_batches'] * passes} steps. A start from updates trains a LoRA for as "
        "many steps as the table of results says, and throws it away.",
        "",
        "| task | steps | rows a step | longest text, tokens | rows of test |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in results.tasks:
        task = grid["tasks"][name]
        lines.append(
            f"| {name} | {task['steps']} | {task['batch_size']} | {task['max_length']} | {task['test_rows']:,} |"
        )
    return lines


def _section(results: Results, target: str, rows: Sequence[Row], page: Path) -> list[str]:
    title = _TARGETS.get(target, target)
    frontier = results.grid["frontier"]
    tasks = [task for task in results.grid["tasks"] if any(task in row["tasks"] for row in rows)]
    lines = ["", f"## {title}", ""]
    drawn = [row for row in rows if row["test"]]
    if drawn:
        picture = page.parent / "images" / f"quality_{target}.png"
        quality_picture.draw(drawn, f"{title}: mean of {', '.join(frontier)}", picture)
        lines += [
            f"![test accuracy against trained numbers](images/{picture.name})",
            "",
            "The lines are the frontiers of this library and of PEFT: the best score with at most so many numbers. *In "
            "the table*: a row of this library's table that is no LoTR, or LoTR as its authors start it. *Our start*: "
            "LoRA, with this library's start; it is not in the frontier. *+50 steps*: so many more than the others, in "
            "the start or after it; not in the frontier either. *Slow*: a third of the swept rates. *On books*: cores "
            "alone, on factors that were trained on another kind of reviews; *from books* goes on from that update. "
            "*Default*: the settings of `lotr train`; *warm* with the head trained alone first, *cold* without, *fast* "
            "with higher rates. *Seeds*: of the task with the fewest.",
            "",
        ]
    lines += [
        f"| method | whose | numbers | {' | '.join(tasks)} | mean of {len(frontier)} | seeds |",
        "|---|---|---:|" + "---:|" * (len(tasks) + 2),
    ]
    for row in rows:
        scores = [_score(row["tasks"].get(task)) for task in tasks]
        whose = _FAMILIES[row["family"]] + (f", {row['more']:+} steps" if row["more"] else "")
        cells = [row["method"], whose, f"{row['numbers']:,}", *scores, _score(row["test"])]
        lines.append(f"| {' | '.join(cells)} | {row['seeds']} |")
    return lines


def _claims(results: Results) -> list[str]:
    lines = [
        "",
        "## Against each other",
        "",
        "Differences of test accuracy in points between runs of the same task and seed, which see the same batches. "
        "*Above* and *below*: outside of the 95 % interval (Student's t, degrees of freedom added over the tasks); "
        "else *level*, which says that these runs cannot tell them apart. Of twenty comparisons one is called by "
        "chance. With fewer than three seeds the error is itself a guess, and the question stays *open*.",
        "",
        "| what | against | on | points | verdict | task by task |",
        "|---|---|---|---:|---|---|",
    ]
    for claim in results.grid["compare"]:
        found, seeds, freedom = results.against(claim["target"], claim["method"], claim["peer"])
        if not found:
            continue
        mean, error = found.pop("all")
        doubt = quality_report.quantile(freedom) * error
        verdict = "above" if mean > doubt else "below" if mean < -doubt else "level"
        verdict = verdict if seeds > 2 else f"open: {seeds} seed{'s' * (seeds > 1)}"
        by_task = ", ".join(f"{task} {100 * d:+.1f}" for task, (d, _) in found.items())
        lines.append(
            f"| {claim['method']} | {claim['peer']} | {_TARGETS.get(claim['target'], claim['target']).lower()} | "
            f"{_points(mean, error)} | {verdict} | {by_task} |"
        )
    return lines


def _steps(results: Results) -> list[str]:
    compare, rows = results.grid["steps"], []
    for method in compare["methods"]:
        found = results.steps(compare["target"], method, compare["peer"])
        if found:
            rows.append(f"| {method} | " + " | ".join(f"{m:.0f}" for m, _ in found.values()) + " |")
            tasks = list(found)
    if not rows:
        return []
    return [
        "",
        "## Steps to 95 % of LoRA's last dev score",
        "",
        f"{_TARGETS[compare['target']]}; dev is measured five times a run, so a step is known to a fifth of the run. "
        "A run that does not get there counts with all its steps. The passes of a start from gradients come on top.",
        "",
        f"| method | {' | '.join(tasks)} |",
        "|---|" + "---:|" * len(tasks),
        *rows,
    ]


def _fits(page: Path) -> list[str]:
    record = page.parent / "data" / "quality_fit.json"
    if not record.is_file():
        return []
    rows = json.loads(record.read_text(encoding="utf-8"))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        "",
        "## What limits",
        "",
        "The adapted weights trained in full, and their change replaced by its best fit in a structure; nothing is "
        "trained again. A structure whose best fit scores well can express what is to be learnt: what it lacks above, "
        "it lacks by its start or its optimisation. LoTR has one pair of factors for all modules of a shape. Accuracy "
        f"on test, mean of {len({row['seed'] for row in rows})} seeds; `python benchmarks/quality_fit.py`.",
    ]
    for target in dict.fromkeys(row["target"] for row in rows):
        lines += [
            "",
            f"| {_TARGETS.get(target, target)}: fit | numbers | of the energy | {' | '.join(tasks)} |",
            "|---|---:|---:|" + "---:|" * len(tasks),
            *(
                f"| {' | '.join(c)} |"
                for c in quality_fit.summary([r for r in rows if r["target"] == target])
            ),
        ]
    return lines


def _defaults(page: Path) -> list[str]:
    record = page.parent / "data" / "defaults.json"
    if not record.is_file():
        return []
    runs = json.loads(record.read_text(encoding="utf-8"))
    return [
        "",
        "## `lotr train` without options",
        "",
        f"The command itself, three epochs in float32; {len(runs)} runs. "
        "`python benchmarks/quality_defaults.py`.",
        "",
        f"| {' | '.join(quality_defaults.HEADER)} |",
        "|---|---:|---|",
        *(f"| {' | '.join(cells)} |" for cells in quality_defaults.summary(runs)),
    ]


def _rates(results: Results, rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "## Rates",
        "",
        "What the sweep chose. *Edge*: the lowest or highest rate that was tried won, so a better one may lie beyond.",
        "",
        "| method | on | rates | tried |",
        "|---|---|---|---|",
    ]
    for row in rows:
        planned = results.grid["methods"][row["method"]]["rates"]
        tried = [rates for rates in planned if rates in results.tried[row["target"], row["method"]]]
        edge = ", edge" if row["rates"] in (tried[0], tried[-1]) else ""
        count = str(len(tried)) if len(tried) == len(planned) else f"{len(tried)} of {len(planned)}"
        rates = ", ".join(f"`{name}` {rate:g}" for name, rate in row["rates"].items())
        on = _TARGETS.get(row["target"], row["target"]).lower()
        lines.append(
            f"| {row['method']} | {on} | {rates} | {count + edge if len(planned) > 1 else 'given'} |"
        )
    return lines


def _points(mean: float, error: float) -> str:
    return f"{100 * mean:+.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def _score(score: Estimate | None) -> str:
    if score is None:
        return ""
    mean, error = score
    return f"{100 * mean:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")
