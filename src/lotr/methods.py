"""The table of methods: a published method is one row, never a class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError, near


@dataclass(frozen=True)
class Method:
    """One row: where the method comes from and the fields of the configuration that it sets, as it was published.

    Args:
        name: Name of the row, as in `LotrConfig(method=...)`.
        title: Title of the paper.
        year: Year of the paper.
        url: Where to read it.
        purpose: One sentence on what it is for.
        modes: Coordinates along which sites share factors; of a tensor train from the output to the input.
        core: Structure of the core.
        blocks: How weights are cut into sites.
        magnitude: Rule on the whole module.
        init: How the factors start.
        core_init: How the numbers of the cores start; default: as the structure says.
        zero: What starts at zero, so that the update does: `"core"`, `"output"`, `"input"`, or `"none"`.
        alpha: Numerator of the scaling rule `σ = alpha / r`; default: `σ = 1`, which is `alpha = r`.
        trainable: What trains: `"all"`, or `"cores"` alone.
        dropout_place: What dropout drops, where it is on; the rate is no part of a row.
        lora_bias: Whether the biases of the modules train too, with one vector a projection.
        differs: One sentence on where the row differs from what was published, and how to have that.
    """

    name: str
    title: str
    year: int
    url: str
    purpose: str
    modes: tuple[str, ...]
    core: str = "free"
    blocks: str = "none"
    magnitude: str = "none"
    init: str = "orthonormal"
    core_init: str | None = None
    zero: str = "core"
    alpha: float | None = None
    trainable: str = "all"
    dropout_place: str = "input"
    lora_bias: bool = False
    differs: str = ""


def _arxiv(title: str, year: int, number: str) -> tuple[str, int, str]:
    return title, year, f"https://arxiv.org/abs/{number}"


_LOTR = _arxiv("LoTR: Low Tensor Rank Weight Adaptation", 2024, "2402.01376")
_LORA = _arxiv("LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685")
_DORA = _arxiv("DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353")
_BORA = _arxiv("BoRA: Bi-dimensional Weight-Decomposed Low-Rank Adaptation", 2024, "2412.06441")
_MAP = _arxiv("MAP: Revisiting Weight Decomposition for Low-Rank Adaptation", 2025, "2505.23094")
_MOSLORA = _arxiv("Mixture-of-Subspaces in Low-Rank Adaptation", 2024, "2406.11909")
_TENSLORA = _arxiv("TensLoRA: Tensor Alternatives for Low-Rank Adaptation", 2025, "2509.19391")
_FACT = _arxiv("FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", 2022, "2212.03145")
_LORTA = _arxiv("LoRTA: Low Rank Tensor Adaptation of Large Language Models", 2024, "2410.04060")
_METATT = _arxiv(
    "MetaTT: A Global Tensor-Train Adapter for Parameter-Efficient Fine-Tuning", 2025, "2506.09105"
)
_CARA = (
    "Canonical Rank Adaptation: An Efficient Fine-Tuning Strategy for Vision Transformers",
    2025,
    "https://openreview.net/forum?id=vexHifrbJg",
)
_LORA_XS = _arxiv(
    "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024, "2405.17604"
)
_LORA_SB = _arxiv(
    "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    2024,
    "2411.19557",
)

# what several rows have in common
_PAIR: dict[str, Any] = {"modes": (), "core": "identity", "init": "kaiming", "zero": "output"}
_CP: dict[str, Any] = {"core": "cp", "init": "uniform", "core_init": "uniform"}
_TRAIN: dict[str, Any] = {"core": "tt", "init": "identity", "core_init": "identity", "zero": "input"}
_SQUARES: dict[str, Any] = {"modes": ("site",), "blocks": "square", "init": "kaiming", "zero": "output"}
_OUR_START = (
    "Published with Gaussian factors and a scaling of alpha / r, whose update grows with the width: init=gaussian and "
    "alpha. Here the columns are orthonormal and the scaling is 1."
)


def _tenslora() -> Iterable[Method]:
    """The seven constructions of TensLoRA, each with both cores."""
    names = {"att": "head", "qkv": "projection", "depth": "layer"}
    differs = {
        "head": "The authors' code interleaves rows, so its heads, and those of its scores, are not the model's; once "
        "the axes are exchanged the two are equal.",
        "projection": "Where grouped queries make projections unequal, the authors repeat heads and average; here "
        "narrower ones use the first rows.",
    }
    for name in ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth"):
        along = [mode for part, mode in names.items() if part in name]
        shared = f"{', '.join(along[:-1])} and {along[-1]}" if along[1:] else along[0]
        others = [part for part in ("layer", "projection") if part not in along]
        each = f" for each {' and '.join(others)}" if others else ""
        for title, suffix, core in (
            ("Tucker", "", {"core": "tucker"}),
            ("CP", "_cp", {**_CP, "zero": "input"}),
        ):
            yield Method(
                f"tenslora_{name}{suffix}",
                *_TENSLORA,
                f"A {title} tensor along {shared}{each}.",
                modes=tuple(mode for mode in ("layer", "projection", "head") if mode in along),
                blocks="head" if "head" in along else "none",
                dropout_place="components",
                differs=" ".join(text for mode, text in differs.items() if mode in along),
                **core,
            )


_ROWS = (
    Method(
        "lotr",
        *_LOTR,
        "The default: layers share factors, one pair for each projection, as the paper's text has it.",
        modes=("layer",),
        differs=_OUR_START,
    ),
    Method(
        "lotr_joint",
        *_LOTR,
        "The smallest LoTR: all layers and projections share one pair, as in the authors' code and all their scores.",
        modes=("layer", "projection"),
        differs=_OUR_START,
    ),
    Method("lora", *_LORA, "The common reference: every module has two factors of its own.", **_PAIR),
    Method(
        "dora", *_DORA, "LoRA, and a trained norm for every output feature.", magnitude="per_output", **_PAIR
    ),
    Method(
        "bora",
        *_BORA,
        "LoRA, and trained norms for every output and every input feature.",
        magnitude="per_output_and_input",
        differs="The authors published no code: start, floors and constant norms are our reading.",
        **_PAIR,
    ),
    Method(
        "map",
        *_MAP,
        "LoRA as a direction, with two trained sizes a module: of the weight and of the update.",
        magnitude="base_and_update",
        differs="The authors published no code: the size of the update starts at zero and both factors orthonormal, "
        "which is our reading.",
        **{**_PAIR, "init": "orthonormal"},
    ),
    Method(
        "moslora",
        *_MOSLORA,
        "LoRA with a trained matrix between its two factors, which mixes their subspaces.",
        core_init="uniform",
        **{**_PAIR, "core": "free"},
    ),
    *_tenslora(),
    Method(
        "fact_tt",
        *_FACT,
        "All weights cut into squares share one pair; a matrix each in between.",
        core_init="kaiming",
        dropout_place="core_output",
        differs="The authors search the scale for each task and train with dropout=0.1; the scale is 1 here.",
        **_SQUARES,
    ),
    Method(
        "fact_tk",
        *_FACT,
        "All weights cut into squares in one Tucker tensor.",
        core="tucker",
        core_init="xavier",
        dropout_place="core_output",
        differs="The authors' code interleaves rank and square of the feed-forward weights and transposes the second; "
        "here every square has a core of its own. Scale and dropout as in fact_tt.",
        **_SQUARES,
    ),
    Method(
        "lorta",
        *_LORTA,
        "One CP tensor over all layers, projections and heads: the fewest numbers a rank.",
        modes=("layer", "projection", "head"),
        blocks="head_rows",
        zero="output",
        alpha=8,
        differs="The authors' code for instruction tuning is this row; that for GLUE applies the transposes, so that "
        "heads cut the input.",
        **_CP,
    ),
    Method(
        "metatt_4d",
        *_METATT,
        "One tensor train over layers and projections.",
        modes=("projection", "layer"),
        **_TRAIN,
    ),
    Method(
        "metatt_5d",
        *_METATT,
        "One tensor train over layers, projections and heads.",
        modes=("head", "projection", "layer"),
        blocks="head",
        **_TRAIN,
    ),
    Method(
        "cara",
        *_CARA,
        "Two CP tensors: query, key and value by heads, and the squares of all other weights, whose biases train too.",
        modes=("site", "head"),
        core="scaled_cp",
        blocks="head_or_square",
        zero="input",
        dropout_place="update",
        lora_bias=True,
        differs="The authors search the scale for each task, train with dropout=0.1, and adapt modules that have "
        "biases; others get none here.",
    ),
    Method(
        "lora_xs",
        *_LORA_XS,
        "Only a core a module trains, between fixed singular directions of its own weight.",
        modes=(),
        init="weight_values",
        core_init="tiny",
        zero="none",
        alpha=16,
        trainable="cores",
        differs="Step 0 is not exactly the base model: the cores start random with a deviation of 1e-5, as published.",
    ),
    Method(
        "lora_sb",
        *_LORA_SB,
        "Only a core a module trains, between the directions of the first step that full fine-tuning would take.",
        modes=(),
        init="first_step",
        trainable="cores",
        differs="lotr.init_from_data(model, batches) takes that step, as published; then step 0 is not the base model.",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """Return the row called `name`.

    Args:
        name: A key of `METHODS`.

    Returns:
        The row.

    Raises:
        ConfigError: There is no such row.

    Example:
        >>> method("lotr").modes
        ('layer',)
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(
            f"method={name!r} is not in the table of methods. {near(name, METHODS)} "
            "`lotr methods` describes them."
        ) from None
