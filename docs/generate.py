"""Parts of pages that are made from the program when the site is built, so they cannot fall behind it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the command line and of the methods."""
    files.append(File.generated(config, "methods.md", content=methods()))
    files.append(File.generated(config, "command_line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where a page asks for them."""
    for mark, table in {"<!-- fields -->": fields, "<!-- memory -->": memory}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


def fields() -> str:
    """Return the fields of `LotrConfig`, with what each says of itself."""
    from lotr import LotrConfig

    lines = [
        "Beside the fields that every configuration of PEFT has (`task_type` and others) it has these. Those without a "
        "default are filled from the row of `method`, or from the `basis`.",
        "",
        "| field | meaning |",
        "|---|---|",
    ]
    for field in dataclasses.fields(LotrConfig):
        if "help" in field.metadata and field.name in vars(LotrConfig)["__annotations__"]:
            has_default = field.default is not dataclasses.MISSING and field.default is not None
            default = f" Default: {field.default}." if has_default else ""
            lines.append(f"| `{field.name}` | {field.metadata['help']}{default} |")
    return "\n".join(lines)


#: Heading → what the names of its rows begin with.
_KINDS = {
    "LoTR": ("lotr",),
    "One pair a module: LoRA and its kin": ("lora", "dora", "bora", "map", "moslora"),
    "One tensor for many modules": ("fact", "lorta", "metatt", "cara", "tenslora"),
}


def methods() -> str:
    """Return the page of methods: what each is for, what it shares, how it starts, its size, and where it differs."""
    from lotr import METHODS

    lines = [
        "# Methods",
        "",
        "A published method is one row of a table over the same classes: structure, start, scaling and what trains, as "
        "published. Where a row differs by choice, one sentence says so. `LotrConfig(method=…)` and `lotr train "
        "--method …` take a name; fields that you set beside it override the row. [Which method when](which_method.md) "
        "helps to choose.",
        "",
        "Sizes are trained numbers at rank 16 on query and value: of BERT-base (12 layers, 768 wide) and a Llama of "
        "8 billion numbers (32 layers, 4,096 wide, 32 query heads, 8 key-value heads).",
    ]
    lines += _measured()
    sizes, scores = _sizes(), _scores()
    for heading, prefixes in _KINDS.items():
        lines += ["", f"## {heading}"]
        for row in METHODS.values():
            own = row.name.startswith(prefixes) and not (heading == "LoTR" and row.name.startswith("lora"))
            if own and not (heading.startswith("One pair") and row.name.startswith("lorta")):
                lines += _described(row, sizes[row.name], scores.get(row.name, []))
    return "\n".join(lines)


def _described(row: Any, sizes: tuple[int, int], scores: list[float]) -> list[str]:
    shares = f"along {', '.join(row.modes)}" if row.modes else "nothing"
    cut = "" if row.blocks == "none" else f", blocks cut by `{row.blocks}`"
    zeros = {"core": "the cores", "output": "`U`", "input": "`V`", "none": "nothing"}
    scaling = "1" if row.alpha is None else f"{row.alpha:g} / r"
    trains = (
        "cores alone"
        if row.trainable == "cores"
        else "factors"
        if row.core == "identity"
        else "factors and cores"
    )
    magnitude = "" if row.magnitude == "none" else f", magnitude `{row.magnitude}`"
    bias = ", `lora_bias`" if row.lora_bias else ""
    cores = "" if row.core_init is None else f", cores `{row.core_init}`"
    bert, llama = sizes
    dropout = "" if row.dropout_place == "input" else f" Dropout drops `{row.dropout_place}`."
    return [
        "",
        f"### `{row.name}`",
        "",
        f"{row.purpose} [{row.title}]({row.url}), {row.year}.",
        "",
        f"- Trains {trains}: {bert:,} numbers on BERT-base, {llama:,} on Llama.",
        f"- Shares {shares}; `{row.core}` core{cut}{magnitude}{bias}.",
        f"- Starts with factors `{row.init}`{cores}; zero: {zeros[row.zero]}; σ = {scaling}.{dropout}",
        *([f"- {row.differs}"] if row.differs else []),
        *([f"- Accuracy on `docstrings`: {_seeds(scores)}."] if scores else []),
    ]


def _scores() -> dict[str, list[float]]:
    """Return the accuracies of every method in docs/data/methods.json, a seed each."""
    record = json.loads((Path(__file__).parent / "data" / "methods.json").read_text(encoding="utf-8"))
    scores: dict[str, list[float]] = {}
    for run in record["runs"]:
        scores.setdefault(run["method"], []).append(run["accuracy"])
    return scores


def _seeds(scores: list[float]) -> str:
    each = ", ".join(f"{100 * score:.1f}" for score in scores)
    return (
        f"{each} (one seed)" if len(scores) == 1 else f"{each} (mean {100 * sum(scores) / len(scores):.1f})"
    )


def _measured() -> list[str]:
    """Return which row is the default and why, with the starts of the papers beside ours."""
    scores = _scores()
    rows = {
        "`lotr`, the default": "lotr",
        "`lotr` with the Gaussian start of its authors": "lotr as published",
        "`lotr_joint`": "lotr_joint",
        "`lotr_joint` with the Gaussian start of its authors": "lotr_joint as published",
        "LoRA (PEFT)": "peft_lora",
        "a new head alone": "head",
    }
    return [
        "",
        "`lotr` is the default: with a fifth of LoRA's numbers it is within two points of it, no smaller row in the "
        "picture is above it, and it is five points above the same structure with the published start.",
        "",
        "| packaged MiniLM on `docstrings`, rank 16 | accuracy, a seed each |",
        "|---|---|",
        *(f"| {name} | {_seeds(scores[method])} |" for name, method in rows.items() if method in scores),
        "",
        "One pass over 3,023 rows, 756 to score; a standard error of one run is 1.7 points. The Gaussian start runs "
        "with σ = 1 / r and the best rate of a sweep. Accuracies below are of the same runs, a seed each.",
        "",
        "![Accuracy of every row against its trained numbers](images/methods.png)",
    ]


def _sizes() -> dict[str, tuple[int, int]]:
    import torch
    import transformers as tf

    from lotr import METHODS, LotrConfig, plan

    llama = tf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        models = tf.BertModel(tf.BertConfig()), tf.LlamaModel(llama)
    counts = {
        name: [plan(model, LotrConfig(method=name)).n_parameters for model in models] for name in METHODS
    }
    return {name: (bert, llama) for name, (bert, llama) in counts.items()}


def memory() -> str:
    """Return the table of what large models and their adapters take while they train."""
    import torch
    import transformers as tf

    from lotr import LotrConfig, plan

    def llama(width: int, inner: int, layers: int, heads: int) -> Any:
        config = tf.LlamaConfig(
            vocab_size=128_256,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
        )
        return tf.LlamaForCausalLM(config)

    experts = tf.Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    )
    with torch.device("meta"):
        models = {
            "Llama 8B": llama(4096, 14_336, 32, 32),
            "Llama 70B": llama(8192, 28_672, 80, 64),
            "Qwen3 30B-A3B": tf.Qwen3MoeForCausalLM(experts),
        }
    lines = [
        "| | weights, bfloat16 | trained: LoRA / LoTR | with gradients and Adam: LoRA / LoTR | activations a token |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, model in models.items():
        weights = 2 * sum(parameter.numel() for parameter in model.parameters())
        counts = [
            plan(model, LotrConfig(method=method, r=16, target_modules="all-linear")).n_parameters
            for method in ("lora", "lotr")
        ]
        state = " / ".join(f"{16 * count / 1e9:.2f} GB" for count in counts)
        kept = 2 * model.config.hidden_size * model.config.num_hidden_layers
        trained = " / ".join(f"{count / 1e6:.1f} M" for count in counts)
        lines.append(f"| {name} | {weights / 1e9:.1f} GB | {trained} | {state} | {kept / 1e3:,.0f} KB |")
    return "\n".join(lines)


def command_line() -> str:
    """Return the help of every command, as typer itself writes it."""
    command = [sys.executable, "-m", "typer", "lotr_cli.app", "utils", "docs", "--name", "lotr"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return text.replace("# `lotr`", "# Command line", 1)
