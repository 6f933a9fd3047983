"""Tables and picture of docs/results.md and docs/results_trials.md, from the runs of `deep.py`."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml
from scipy.stats import t

import pictures
from deep import HERE, Key, Plan, read, text_of, wanted
from records import fill, markdown

MARGIN = 0.01  # nats a token within which two methods count as equal, stated before the runs


class Final(NamedTuple):
    """The runs of a method with its rates fixed."""

    modules: str
    numbers: int
    losses: list[float]

    @property
    def mean(self) -> float:
        """Mean loss over seeds."""
        return statistics.mean(self.losses)


def final_runs(
    plan: Plan, runs: dict[Key, dict[str, str]], part: str = "final"
) -> dict[tuple[str, str, int], Final]:
    """Return the runs of a plan whose rates were fixed, by text, method and steps, the smallest first.

    A file may hold runs of other rates too.
    """
    asked = {key for key, _ in wanted(plan)}
    final: dict[tuple[str, str, int], Final] = {}
    for key, run in sorted(runs.items(), key=lambda item: int(item[1]["numbers"])):
        if key.part == part and key in asked:
            of = text_of(plan, key.method), key.method, key.steps
            final.setdefault(of, Final(run["modules"], int(run["numbers"]), [])).losses.append(
                float(run["test"])
            )
    return final


def main_runs(plan: Plan, runs: dict[Key, dict[str, str]], part: str = "final") -> dict[str, Final]:
    """Return the runs whose rates were fixed, on the plan's text, of the plan's length, by method."""
    return {
        method: own
        for (text, method, steps), own in final_runs(plan, runs, part).items()
        if (text, steps) == (plan["text"], plan["steps"])
    }


def other_texts(plan: Plan, runs: dict[Key, dict[str, str]]) -> list[str]:
    """Return a table of the final runs on other texts, or of other lengths."""
    body = [
        [text, method, f"{own.numbers:,}", str(steps), f"{own.mean:.3f}", str(len(own.losses))]
        for (text, method, steps), own in sorted(
            final_runs(plan, runs).items(), key=lambda item: item[0][::2]
        )
        if (text, steps) != (plan["text"], plan["steps"])
    ]
    return markdown(("text", "", "numbers", "steps", "loss, test", "seeds"), body, left=2)


def spread_of(final: dict[str, Final]) -> tuple[float, int]:
    """Return the spread of a seed, taken as one for all methods, and its degrees of freedom."""
    freedom = sum(len(own.losses) - 1 for own in final.values())
    squares = sum((loss - own.mean) ** 2 for own in final.values() for loss in own.losses)
    return (squares / freedom) ** 0.5, freedom


def difference_of(pairs: list[list[str]], final: dict[str, Final], questions: int) -> list[str]:
    """Return the mean difference of pairs of methods with its interval, and what it says.

    The intervals hold 95 % for all questions together (Student's t, Bonferroni). *Equal* and *not worse* are said only
    where an interval lies within `MARGIN`.
    """
    spread, freedom = spread_of(final)
    mean = statistics.mean(final[method].mean - final[other].mean for method, other in pairs)
    seeds = sum(1 / len(final[method].losses) for pair in pairs for method in pair)
    half = float(t.ppf(1 - 0.025 / questions, freedom)) * spread * seeds**0.5 / len(pairs)
    low, high = mean - half, mean + half
    says = "**better**" if high < 0 else "*worse*" if low > 0 else "level"
    if low > -MARGIN and high < MARGIN:
        says = "equal"
    elif high < MARGIN and says == "level":
        says = "not worse"
    return [f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", says]


def sizes_and_losses(pair: list[str], final: dict[str, Final]) -> list[str]:
    """Return the numbers and the mean losses of two methods."""
    own, other = (final[method] for method in pair)
    return [f"{own.numbers:,} / {other.numbers:,}", f"{own.mean:.4f} / {other.mean:.4f}"]


def with_spread(table: list[str], final: dict[str, Final]) -> list[str]:
    """Return a table with the spread of a seed below it."""
    (spread, freedom), seeds = spread_of(final), [len(own.losses) for own in final.values()]
    many = f"{min(seeds)} to {max(seeds)}" if len(set(seeds)) > 1 else str(seeds[0])
    says = f"One seed's spread is {spread:.4f} nats ({freedom} degrees of freedom, {many} seeds)."
    return [*table, "", says]


def compared(plan: Plan, final: dict[str, Final]) -> list[str]:
    """Return a table of the differences between the methods that the plan names."""
    pairs = [pair for pair in plan["compare"] if all(method in final for method in pair)]
    rows = [
        [*pair, *sizes_and_losses(pair, final), *difference_of([pair], final, len(pairs))] for pair in pairs
    ]
    header = ("", "against", "numbers", "loss, test", f"difference (95 % for all {len(pairs)})", "")
    return with_spread(markdown(header, rows, left=2), final)


def confirmed(questions: dict[str, list[list[str]]], runs: dict[str, Final]) -> list[str]:
    """Return a table of the mean differences that were asked for before their runs, below the pairs they are of."""
    final = {method: runs[method] for pairs in questions.values() for pair in pairs for method in pair}
    pairs = [list(pair) for pair in dict.fromkeys(tuple(pair) for of in questions.values() for pair in of)]
    rows = []
    for own, other in pairs:
        difference = f"{final[own].mean - final[other].mean:+.4f}"
        rows.append([own, other, *sizes_and_losses([own, other], final), difference, ""])
    for name, of in questions.items():
        rows.append([name, "", "", "", *difference_of(of, final, len(questions))])
    header = ("", "against", "numbers", "loss, test", "difference (95 % over the questions)", "")
    return with_spread(markdown(header, rows, left=2), final)


def reached(plan: Plan, final: dict[str, Final]) -> list[str]:
    """Return a table of the smallest size of each method, of those measured, that is near the loss of another."""
    lines: list[str] = []
    for name, within in plan["reach"].items():
        if name not in final:
            continue
        target, smallest = final[name], {}
        for method, own in final.items():
            if own.modules == target.modules and own.mean <= target.mean + within:
                smallest.setdefault(family(method), (method.removesuffix(" gradient"), own))
        body = [[method, f"{own.numbers:,}", f"{own.mean:.3f}"] for method, own in smallest.values()]
        header = (f"within {within} of {name} ({target.mean:.3f})", "numbers", "loss, test")
        lines += ["", *markdown(header, body)]
    return lines[1:]


def on_dev(methods: list[str], runs: dict[Key, dict[str, str]]) -> list[str]:
    """Return a table of methods at the best of their rates on dev, with seed 0, the lowest loss first."""
    body = []
    for method in methods:
        tried = {key: run for key, run in runs.items() if key.method == method and key.seed == 0}
        if tried:
            best = min(tried, key=lambda key, of=tried: float(of[key]["dev"]))
            run = tried[best]
            numbers = f"{int(run['numbers']):,}"
            body.append([method, numbers, best.rates, str(len(tried)), f"{float(run['dev']):.3f}"])
    return markdown(
        ("", "numbers", "best rates", "tried", "loss, dev"), sorted(body, key=lambda row: row[-1])
    )


def family(method: str) -> str:
    """Return a method without its rank."""
    before, _, after = method.partition(" r")
    return f"{before} {after.partition(' ')[2]}"


def draw(final: dict[str, Final], path: Path) -> None:
    """Draw loss against trained numbers."""
    spread, _ = spread_of(final)
    panels: dict[str, list[pictures.Point]] = {}
    for method, own in final.items():
        error, whose = spread / len(own.losses) ** 0.5, "PEFT" if "lora" in method else "this library"
        label = method.removesuffix(" gradient").removesuffix(" everywhere")
        point = pictures.Point(label, family(method), own.numbers, own.mean, error, whose)
        panels.setdefault(own.modules.replace("_proj", "").replace(" ", ", "), []).append(point)
    pictures.scores(panels, "loss per token, test (lower is better)", path)


def tables(plan: Plan, runs: dict[Key, dict[str, str]]) -> dict[str, dict[str, list[str]]]:
    """Return the tables of each page by name."""
    final, again = main_runs(plan, runs), main_runs(plan, runs, "confirm")
    return {
        "results.md": {
            **{name: confirmed(questions, again) for name, questions in plan["asked"].items()},
            "deep": compared(plan, final),
            "reach": reached(plan, final),
        },
        "results_trials.md": {
            "texts": other_texts(plan, runs),
            **{name: on_dev(methods, runs) for name, methods in plan["on_dev"].items()},
        },
    }


def main() -> None:
    """Write what there is into the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=HERE / "deep.yaml")
    parser.add_argument("--runs", type=Path, default=Path("docs/data/deep.csv"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages")
    options = parser.parse_args()
    plan, runs = yaml.safe_load(options.plan.read_text()), read(options.runs)
    for page, own in tables(plan, runs).items():
        for name, table in own.items():
            fill(options.docs / page, name, table)
    draw(main_runs(plan, runs), options.docs / "images" / "deep.png")


if __name__ == "__main__":
    main()
