"""Which models, sizes, methods and ranks are measured."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, replace

from peers import ADAPTERS, BASE, COMPILED, FLOOR, FULL, MERGED, MKL, TIGHT, plain

Case = tuple[str, int | None]  # method, rank

#: batch × tokens of the comparison by rank, on a processor and on an accelerator
REFERENCE = {"minilm": (32, 64), "bert-base": (8, 128), "gpt2": (2, 256), "llama-half": (1, 128)}
REFERENCE_CUDA = {"minilm": (512, 128), "bert-base": (128, 256), "gpt2": (32, 1024), "llama-1b": (8, 2048)}
RANKS = (4, 8, 16, 32, 64, 128)
#: batches of 128 tokens of the comparison by tokens: 128 … 4096, and eight times as many on an accelerator
BATCHES = (1, 4, 16, 32)
MAIN = ("peft_lora", "lotr", "lotr_cores")
#: what the same takes where oneDNN has no part in it
ALONE = ("lotr" + MKL, "lotr_cores" + MKL)


@dataclass(frozen=True)
class Setting:
    """One model at one size, and what is measured in it side by side."""

    shape: str
    batch: int
    length: int
    cases: tuple[Case, ...]

    def __str__(self) -> str:
        return f"{self.shape}, {self.batch} × {self.length}"


def ranked(methods: Iterable[str], ranks: Iterable[int]) -> tuple[Case, ...]:
    """Return every method at every rank."""
    ranks = tuple(ranks)
    return tuple((method, r) for method in methods for r in ranks)


def one(options: Namespace) -> Setting:
    """Return the one setting that a command line names."""
    free = tuple((method, None) for method in options.methods if plain(method) not in ADAPTERS)
    adapters = [method for method in options.methods if plain(method) in ADAPTERS]
    cases = ((FLOOR, None), *free, *ranked(adapters, options.ranks))
    return Setting(options.shape, options.batch, options.length, cases)


def forward(setting: Setting) -> Setting:
    """Return what is measured of a setting without gradients: the base, adapters, and some of them merged."""
    adapters = tuple((method, r) for method, r in setting.cases if plain(method) in ADAPTERS)
    merged = tuple(
        (method + MERGED, r) for method, r in adapters if r == 16 and method in ("peft_lora", "lotr")
    )
    graphs = any(method.endswith(COMPILED) for method, _ in adapters)
    bases = ((BASE, None), (BASE + COMPILED, None)) if graphs else ((BASE, None),)
    return replace(setting, cases=(*bases, *adapters, *merged))


def grid(short: bool, cuda: bool) -> list[Setting]:
    """Return the sizes at which training steps and their memory are measured."""
    sizes = REFERENCE_CUDA if cuda else REFERENCE
    return _short(sizes) if short else [*_by_rank(sizes), *_by_tokens(sizes, 8 if cuda else 1)]


def memory_grid(short: bool, cuda: bool) -> list[Setting]:
    """Return the sizes at which memory is measured: in the short form a quarter of the tokens."""
    settings = [
        replace(
            s, cases=tuple(case for case in s.cases if not case[0].endswith(MKL))
        )  # the library decides no sizes
        for s in grid(short, cuda)
    ]
    return [replace(s, batch=max(1, s.batch // 4)) for s in settings] if short else settings


def _short(sizes: dict[str, tuple[int, int]]) -> list[Setting]:
    few: tuple[Case, ...] = ((FLOOR, None), *ranked((*MAIN, *ALONE), (16,)))
    magnitudes = ranked(("peft_dora", "lotr_per_output", "lotr_per_output_cores"), (16,))
    more: dict[str, tuple[Case, ...]] = {
        "minilm": (("peft_lora", 8), ("lotr", 8), *magnitudes, ("peft_vera", 16), (FULL, None)),
        "bert-base": (("lotr", 8),),
    }
    return [Setting(shape, *size, (*few, *more.get(shape, ()))) for shape, size in sizes.items()]


def _by_rank(sizes: dict[str, tuple[int, int]]) -> list[Setting]:
    others = ranked((name for name in ADAPTERS if name not in MAIN), (16,))
    cases = ((FLOOR, None), (TIGHT, None), (FULL, None), *ranked(MAIN, RANKS), *others, *ranked(ALONE, (16,)))
    compiled = ((FLOOR + COMPILED, None), *ranked((method + COMPILED for method in MAIN), (16,)))
    return [
        Setting(shape, *size, (*cases, *compiled) if shape == "minilm" else cases)
        for shape, size in sizes.items()
    ]


def _by_tokens(sizes: dict[str, tuple[int, int]], times: int) -> list[Setting]:
    cases = ((FLOOR, None), *ranked(MAIN, (16,)))
    return [
        Setting(shape, times * batch, 128, cases)
        for shape, reference in sizes.items()
        for batch in BATCHES
        if (times * batch, 128) != reference  # that one is among the comparisons by rank
    ]
