"""Twelve LoRAs trained with PEFT on MiniLM, before and after they became one bank, at four sizes.

    python benchmarks/compress_loras.py --data FOLDER --json out/compress_loras.json

Three families of the same tasks: every adapter starts at an A of its own, all start at one A, or that one A is not
trained. Sizes are shares of the LoRAs' bytes, all in bfloat16, without heads.

*bank*, *bank, diagonal*, *bank, clusters*: its tasks in a bank with free or diagonal cores, or with factors for each
cluster of tasks, as many as pay. *own SVD*: each adapter cut by its own SVD,
the largest directions of all its modules. *merged*: PEFT's `add_weighted_adapter(combination_type="svd")`, one adapter
for all tasks with the head of each. *bound*: the least error that any factors leave which free cores of this size
share, from the spectra of the stacked updates. *held out*: every fourth adapter, left out of a second fit and projected
afterwards; *in the fit* is the same adapters where they were not. Scores are accuracies on each task's own test rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import lotr
from lotr.compression.add import add
from lotr.compression.ranks import Curve, chosen_ranks
from lotr.compression.ranks import error_of as error_at
from lotr.training.base_model import load_model
from real_loras import RANK, STARTS, WEIGHTS, Family, Pairs, Results, Row, Scores, error_of, mean, options
from records import calm, fill, markdown, write

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
Case = tuple[Row, Callable[[], Row], Callable[[], Scores] | None]
TITLES = {
    "error": "Relative error",
    "error_held": "Relative error of every fourth adapter, in the fit and held out",
    "score": "Mean accuracy of all tasks",
    "score_held": "Mean accuracy of every fourth task, in the fit and held out",
}
#: Settings of `lotr.compress` by what the tables call them.
BANKS: dict[str, Row] = {
    "bank": {},
    "bank, diagonal": {"core": "diagonal"},
    "bank, clusters": {"clusters": "auto"},
}


def cut_by_svd(pairs: Pairs, size: int) -> Pairs:
    """Keep the largest singular directions of all modules, as many as there are bytes for."""
    parts = {m: torch.linalg.svd(B @ A, full_matrices=False) for m, (A, B) in pairs.items()}
    kept = dict.fromkeys(parts, 0)
    for _, module in sorted(
        ((float(s), m) for m, (_, S, _) in parts.items() for s in S[:RANK]), reverse=True
    ):
        size -= 2 * sum(B.shape[0] + A.shape[1] for A, B in [pairs[module]])
        if size < 0:
            break
        kept[module] += 1
    return {m: (Vh[: kept[m]], U[:, : kept[m]] * S[: kept[m]]) for m, (U, S, Vh) in parts.items() if kept[m]}


def classifier() -> nn.Module:
    """Return MiniLM with a head for two classes."""
    model: nn.Module = load_model("minilm", "classification", ("0", "1"))
    return model


def merged_by_peft(
    folders: list[Path], place: Path, rank: int, base: Callable[[], nn.Module] = classifier
) -> Pairs:
    """Merge all adapters into one of some rank."""
    model: Any = None
    names = [f"t{n}" for n in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        plain = place / name
        shutil.rmtree(plain, ignore_errors=True)
        plain.mkdir(parents=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"modules_to_save": None, "task_type": None}
        (plain / "adapter_config.json").write_text(json.dumps(config))
        tensors = {key: t for key, t in load_file(folder / WEIGHTS).items() if ".lora_" in key}
        save_file(tensors, plain / WEIGHTS, metadata={"format": "pt"})
        if model is None:
            model = PeftModel.from_pretrained(base(), str(plain), name)
        else:
            model.load_adapter(str(plain), name)
    weights = [1 / len(names)] * len(names)
    model.add_weighted_adapter(names, weights, "all", combination_type="svd", svd_rank=rank)
    return {
        path: (
            module.lora_A["all"].weight.detach(),
            module.lora_B["all"].weight.detach() * module.scaling["all"],
        )
        for path, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


def bound(pairs: dict[str, Pairs], size: int) -> Row:
    """Return the error that no free cores of this size can fall below, whatever their factors.

    Factors of ranks (k, r) keep of a stack at most the k and r largest eigenvalues of its second moments.
    """
    norms = {t: sum(float((B @ A).square().sum()) for A, B in own.values()) for t, own in pairs.items()}
    curves = {}
    for module, (A, B) in next(iter(pairs.values())).items():
        stack = torch.stack([own[module][1] @ own[module][0] / norms[t] ** 0.5 for t, own in pairs.items()])
        stack = stack.double()
        sides = (torch.einsum("toi,tpi->op", stack, stack), torch.einsum("toi,toj->ij", stack, stack))
        left, right = (torch.linalg.eigvalsh(side).flip(0).cumsum(0) for side in sides)
        kept, size_of = torch.minimum(left[:, None], right), (2 * B.shape[0], 2 * A.shape[1])
        curves[module] = Curve(float(stack.square().sum()), kept, size_of, 2 * len(pairs))
    return {"error": error_at(curves, chosen_ranks(curves, max_bytes=size))}


class Compared:
    """A family at its sizes.

    Args:
        family: The adapters.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.place = family, family.work / "banks" / f"{family.name}-{len(family.folders)}"
        self.held = [name for n, name in enumerate(family.folders) if n % 4 == 2]

    def cases(self) -> Iterator[Case]:
        """Yield what is compared: its key, how bytes and error are measured, and how its scores."""
        family = self.family
        nothing: dict[str, Pairs] = {name: {} for name in family.folders}
        yield {"what": "the LoRAs"}, lambda: {"bytes": 2 * family.numbers, "error": 0.0}, family.scores_before
        yield {"what": "heads alone"}, lambda: {"bytes": 0, "error": 1.0}, lambda: family.scores_with(nothing)
        for share in SHARES:
            size = int(2 * family.numbers * share)
            yield {"what": "bound", "share": share}, partial(bound, family.pairs, size), None
            for what, cut in {"own SVD": self._own_svd, "merged": self._merged}.items():
                if what == "own SVD" or family.start == "own":
                    yield {"what": what, "share": share}, *self._of_pairs(partial(cut, size))
            for what, settings in BANKS.items():
                bank = self.place / f"{what}-{share}"
                yield {"what": what, "share": share}, *self._of_bank(bank, size, settings)
                held = self.place / f"{what}-{share}-held"
                yield {"what": f"{what}, held out", "share": share}, *self._of_held_out(held, size, settings)

    def _of_pairs(
        self, cut: Callable[[], dict[str, Pairs]]
    ) -> tuple[Callable[[], Row], Callable[[], Scores]]:
        def error() -> Row:
            after = cut()
            distinct = {id(pair): pair for own in after.values() for pair in own.values()}.values()
            size = sum(2 * (A.numel() + B.numel()) for A, B in distinct)
            return {"bytes": size, "error": error_of(self.family.pairs, after)}

        return error, lambda: self.family.scores_with(cut())

    def _own_svd(self, size: int) -> dict[str, Pairs]:
        each = size // len(self.family.pairs)
        return {name: cut_by_svd(own, each) for name, own in self.family.pairs.items()}

    def _merged(self, size: int) -> dict[str, Pairs]:
        modules = next(iter(self.family.pairs.values())).values()
        rank = max(1, size // sum(2 * (A.shape[1] + B.shape[0]) for A, B in modules))
        merged = merged_by_peft(list(self.family.folders.values()), self.place / "plain", rank)
        return dict.fromkeys(self.family.pairs, merged)

    def _fit(self, bank: Path, names: list[str], size: int, settings: Row) -> Row:
        folders = [self.family.folders[name] for name in names]
        heads = self.family.head_bytes(names)
        report = lotr.compress(folders, bank, "minilm", max_bytes=size + heads, **settings, overwrite=True)
        return {
            "bytes": report.bytes_of_numbers - heads,
            "error": report.error,
            "ranks": [group["ranks"] for group in report.groups],
            "seconds": report.seconds,
            "errors": {row["task"]: row["error"] for row in report.by_task},
        }

    def _of_bank(
        self, bank: Path, size: int, settings: Row
    ) -> tuple[Callable[[], Row], Callable[[], Scores]]:
        def error() -> Row:
            row = self._fit(bank, list(self.family.folders), size, settings)
            return row | {"error_held": rms([row["errors"][name] for name in self.held])}

        return error, lambda: self.family.scores_in(bank)

    def _of_held_out(
        self, bank: Path, size: int, settings: Row
    ) -> tuple[Callable[[], Row], Callable[[], Scores]]:
        def error() -> Row:
            row = self._fit(
                bank, [name for name in self.family.folders if name not in self.held], size, settings
            )
            errors = add(bank, [self.family.folders[name] for name in self.held])["added"]
            error = rms(list(errors.values()))
            return row | {"error": error, "error_held": error, "error_of_fit": row["error"], "errors": errors}

        return error, lambda: self.family.scores_in(bank, self.held)


def rms(values: list[float]) -> float:
    """Return the root of the mean square."""
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def main() -> None:
    parser = options(__doc__ or "", 12)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    given = parser.parse_args()
    calm()
    results = Results(given.work / "results.jsonl")
    of, every = {"tasks": given.tasks}, []
    for start in given.starts:  # errors of all before scores, which take longer
        compared = Compared(Family(given.work, given.data, start, None, given.tasks))
        every.append(compared)
        for key, error, _ in compared.cases():
            results.get(of | {"family": start, "measured": "error"} | key, error)
    for compared in every:
        for key, _, score in compared.cases():
            if score is not None:
                own = {"family": compared.family.start, "measured": "score"} | key
                results.get(of | own, partial(scored, score, compared.held))
    keys = ["tasks", "family", "what", "share"]
    errors = [row for row in results.rows if of.items() <= row.items() and "error" in row]
    rows = [row | results.of(row | {"measured": "score"}, keys) for row in errors]
    lines = tables(rows)
    print("\n".join(lines))
    if given.json:
        write(given.json, rows)
    if given.page:
        fill(given.page, "loras", lines)


def tables(rows: list[Row]) -> list[str]:
    """Return a table of errors and one of scores, in Markdown."""
    held = [f"{what}, held out" for what in BANKS]
    lines: list[str] = []
    for value, columns in {
        "error": ["bound", "own SVD", *BANKS, "merged"],
        "error_held": [*BANKS, *held],
        "score": ["the LoRAs", "heads alone", "own SVD", *BANKS, "merged"],
        "score_held": ["the LoRAs", *BANKS, *held],
    }.items():
        cells = {(r["family"], r.get("share"), r["what"]): f"{r[value]:.3f}" for r in rows if value in r}
        body = [
            [family, f"1/{round(1 / share)}", *(_cell(cells, family, share, what) for what in columns)]
            for family in dict.fromkeys(row["family"] for row in rows)
            for share in SHARES
        ]
        lines += [f"**{TITLES[value]}**", "", *markdown(["A starts", "size", *columns], body, left=2), ""]
    return lines[:-1]


def _cell(cells: dict[Any, str], family: str, share: float, what: str) -> str:
    return cells.get((family, share, what), "") or cells.get((family, None, what), "")  # what has no size


def scored(score: Callable[[], Scores], held: list[str]) -> Row:
    """Return the mean of all scores, and of those that another fit leaves out."""
    scores = score()
    return {"score": mean(scores), "score_held": mean(scores, held), "scores": scores}


if __name__ == "__main__":
    main()
