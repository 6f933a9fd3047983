"""Every setting of a training run, described once: the options, the config file and the record come from here.

The command line shows its help from this file before torch is imported (`lotr_cli.light`), so it imports the standard
library and `lotr.errors` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, near


def setting(default: Any, panel: str, text: str, shown: str | None = None) -> Any:
    """Return a field with its help; `shown` describes a default that depends on other settings."""
    return field(default=default, metadata={"panel": panel, "help": text, "shown": shown})


def unset(panel: str, text: str, default: str) -> Any:
    """Return a field that is `None` until the run decides it; `default` says how."""
    return setting(None, panel, text, f"default: {default}")


_DATA, _ADAPTER, _TRAINING, _RUN = "Model and data", "Adapter", "Training", "Run"


@dataclass(frozen=True)
class Settings:
    """Settings of a run, and how it was called."""

    def named(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the run as plain values; how it was called is not one of them."""
        called = ("resume", "overwrite", "replace")
        return {name: value for name, value in asdict(self).items() if name not in called}


@dataclass(frozen=True)
class TrainSettings(Settings):
    """What `lotr train` is told. Fields left at `None` are decided by the run, which says how."""

    model: str | None = setting(
        None,
        _DATA,
        "Local folder, .gguf file, hub id, or packaged: `minilm` (all-MiniLM-L6-v2) or `smollm2` (SmolLM2-135M).",
        "required",
    )
    train: str | None = setting(
        None,
        _DATA,
        "Training data: .csv, .tsv, .json, .jsonl, .parquet or .txt file, folder of files, hub data set (`glue/sst2`), "
        "or `docstrings` (built in).",
        "required",
    )
    eval: str | None = unset(_DATA, "Evaluation data.", "its own split, or a tenth held out")
    output: str | None = setting(None, _DATA, "Folder for the adapter and its reports.", "required")
    text: str = setting("text", _DATA, "Column with the text.")
    text2: str = setting("text2", _DATA, "Column with the second text of a pair, if there is one.")
    label: str = setting("label", _DATA, "Column with the label.")
    task: str | None = unset(_DATA, "classification, regression or causal-lm.", "guessed from the label")
    max_length: int | None = unset(_DATA, "Longest text, in tokens.", "128, or as many as the model takes")

    method: str = setting(
        "lotr",
        _ADAPTER,
        "Row of `lotr methods`; or for comparison `peft_lora`, `peft_dora` (PEFT's own) and `head`.",
    )
    rank: str = setting(
        "16", _ADAPTER, "Rank of the shared factors: one number, `k,r`, or `auto` with a budget."
    )
    budget: int | None = unset(_ADAPTER, "Numbers that `--rank auto` may train.", "none")
    target_modules: str | None = unset(
        _ADAPTER, "Modules to adapt: names with commas, a regex, or `all-linear`.", "by architecture"
    )
    target_parameters: str | None = unset(
        _ADAPTER, "Parameters that hold the experts of a layer, `mlp.experts.down_proj`, with commas.", "none"
    )
    modes: str | None = unset(
        _ADAPTER,
        "What shares factors: any of `layer,projection,head,expert,task`; `site`; or `none`.",
        "by method",
    )
    core: str | None = unset(
        _ADAPTER, "Structure of the cores: free, identity, tucker, cp, scaled_cp, tt.", "by method"
    )
    core_ranks: str | None = unset(
        _ADAPTER,
        "Tucker cores: rank of every mode (`4`), or of each (`layer=8,head=4`).",
        "the rank, at most the mode's extent",
    )
    blocks: str | None = unset(
        _ADAPTER, "How weights are cut: none, head, head_rows, square, head_or_square.", "by method"
    )
    unequal: str | None = unset(
        _ADAPTER,
        "What unequal weights do that would share: grouped_query, slice (all use first rows), separate, error.",
        "grouped_query",
    )
    magnitude: str | None = unset(
        _ADAPTER,
        "Rule on the whole weight: none, per_output, per_output_and_input, base_and_update.",
        "by method",
    )
    trainable: str | None = unset(
        _ADAPTER, "What trains: all, or cores (the factors stay as they start).", "by method"
    )
    basis: str | None = unset(
        _ADAPTER,
        "Adapter whose factors are kept: its structure is taken, and only cores and a head train.",
        "none",
    )
    scaling: float | None = unset(
        _ADAPTER, "σ: multiplies the update; not divided by the rank.", "by method, mostly 1"
    )
    alpha: float | None = unset(_ADAPTER, "Instead of scaling: σ = alpha / rank.", "by method, mostly none")
    init: str | None = unset(
        _ADAPTER,
        "How the factors start: orthonormal, gaussian, kaiming, uniform, identity, weight, weight_values; or gradient, "
        "first_step, from the first batches.",
        "by method; gradient where cores alone train",
    )
    core_init: str | None = unset(
        _ADAPTER, "How the cores start: uniform, xavier, tiny, identity.", "by method and structure"
    )
    zero: str | None = unset(
        _ADAPTER, "What starts at zero, so that the update does: core, output, input, none.", "by method"
    )
    lora_bias: bool | None = unset(
        _ADAPTER, "Train biases too: a vector for each projection, which layers share.", "by method"
    )
    start_batches: int | None = unset(_ADAPTER, "Batches whose gradients a start from data takes.", "8")
    dropout: float = setting(0.0, _ADAPTER, "Probability of dropping a number of the update.")
    dropout_place: str | None = unset(
        _ADAPTER,
        "What dropout drops: input, core_output, components, update (of ΔW).",
        "by method, mostly input",
    )

    lr: float | None = unset(_TRAINING, "Learning rate of the factors.", "by method")
    core_lr: float | None = unset(_TRAINING, "Learning rate of the cores.", "by method")
    magnitude_lr: float | None = unset(_TRAINING, "Learning rate of the magnitudes.", "by method")
    head_lr: float | None = unset(_TRAINING, "Learning rate of a new head.", "by method")
    head_warmup: int | None = unset(
        _TRAINING,
        "Steps in which a new head trains alone, before the adapter starts.",
        "a fifth of the steps, at most 20, where a head is new",
    )
    epochs: float = setting(3.0, _TRAINING, "Passes over the training data.")
    max_steps: int | None = unset(_TRAINING, "Steps, instead of epochs.", "by epochs")
    batch_size: int = setting(32, _TRAINING, "Rows a forward pass and device.")
    gradient_accumulation_steps: int = setting(1, _TRAINING, "Forward passes whose gradients make one step.")
    packing: bool = setting(
        False, _TRAINING, "Texts of a batch one behind the other, without padding; causal-lm alone."
    )
    scheduler: str = setting(
        "linear", _TRAINING, "How the rates go on after the warm-up: linear, cosine, constant_with_warmup, …"
    )
    warmup: float = setting(0.06, _TRAINING, "Share of the steps in which the rates rise.")
    weight_decay: float = setting(0.0, _TRAINING, "Weight decay of AdamW.")
    gradient_checkpointing: bool = setting(False, _TRAINING, "Recompute activations to save memory.")
    dtype: str = setting("float32", _TRAINING, "Type of the base model: float32, bfloat16, float16.")
    load_in: str | None = unset(_TRAINING, "Quantise the base model: 4bit or 8bit, by bitsandbytes.", "none")
    seed: int = setting(0, _TRAINING, "Seed of everything random.")

    eval_steps: int | None = unset(_RUN, "Steps between evaluations and checkpoints.", "five a run")
    resume: bool = setting(False, _RUN, "Go on from the last checkpoint in OUTPUT.")
    overwrite: bool = setting(False, _RUN, "Replace an output folder that is not empty.")
    push_to_hub: str | None = unset(_RUN, "Repository on the hub that the result is uploaded to.", "none")
    report_to: str = setting(
        "none", _RUN, "Where transformers logs to: none, tensorboard (in OUTPUT/runs), wandb, …"
    )


def read_options(options: Mapping[str, Any], file: str | Path | None = None) -> dict[str, Any]:
    """Return the settings that were named: options, where they are not `None`, over a YAML file."""
    known = {f.name: str(f.type) for f in fields(TrainSettings)}
    values = {} if file is None else _read_yaml(Path(file), known)
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{name!r} is not a setting. {near(name, known)}")
        if value is not None:
            values[name] = value
    return values


def load_yaml(path: Path, option: str) -> Any:
    """Read YAML, or JSON, without tags of Python's.

    Args:
        path: The file.
        option: What named it, for the message.

    Raises:
        ConfigError: The file is missing, or is no YAML; the message is one line.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{option} {path} does not exist.") from None
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}. Name a file.") from None
    except RecursionError:
        raise ConfigError(f"{option} {path} nests too deeply.") from None
    except (yaml.YAMLError, ValueError, AttributeError, TypeError) as error:  # also dates that are none
        raise ConfigError(f"{option} {path} is not valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path, known: Mapping[str, str]) -> dict[str, Any]:
    content = load_yaml(path, "--config")
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold settings by name, for example `rank: 16`.")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path} names {name!r}, which is not a setting. {near(name, known)}")
        values[name] = _cast(path, name, value, known[name].partition(" ")[0])
    return values


def _cast(path: Path, name: str, value: Any, kind: str) -> Any:
    """Return a YAML value in the type of its setting; YAML reads `1e-3` as text and `16` as a number."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = ",".join(f"{key}={part}" for key, part in value.items())
    if isinstance(value, list):
        value = ",".join(str(part) for part in value)
    if kind == "bool" and not isinstance(value, bool):
        raise ConfigError(f"--config {path}: {name}={value!r} is neither true nor false.")
    try:
        return {"int": int, "float": float, "str": str, "bool": bool}[kind](value)
    except (OverflowError, TypeError, ValueError):
        raise ConfigError(
            f"--config {path}: {name}={str(value)[:80]!r} is not a value of type {kind}."
        ) from None


def read_modes(text: str | None) -> tuple[str, ...] | None:
    """Read coordinates with commas, `layer, projection`; `none` shares nothing."""
    return None if text is None else tuple(mode for mode in re.findall(r"[^,\s]+", text) if mode != "none")


def read_core_ranks(text: str | None) -> int | dict[str, int] | None:
    """Read `4`, or `layer=8,head=4`."""
    try:
        if text is None or "=" not in text:
            return None if text is None else int(text)
        return {name.strip(): int(n) for name, n in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(
            f"core_ranks={text!r} holds no ranks. Use a number, or `mode=number` with commas between."
        ) from None


def read_rank(text: str) -> tuple[int, int]:
    """Read `16`, or `8,16`."""
    parts = str(text).split(",")
    if len(parts) > 2 or not all(re.fullmatch(r"\s*[1-9]\d*\s*", part) for part in parts):
        raise ConfigError(
            f"rank={text!r} is not a rank. Use a positive integer, a pair `k,r` of them, or `auto`."
        )
    return int(parts[0]), int(parts[-1])


def read_names(text: str | None) -> list[str] | None:
    """Read names with commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def read_target_modules(text: str | None) -> list[str] | str | None:
    """Read names with commas, `query,value`; a regex, `layer.[01].*`; or `all-linear`."""
    if text is None or text == "all-linear":
        return text
    if not re.search(r"[*+?()\[\]|\\^$]", text):  # a character that no module's name has
        return read_names(text)
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(
            f"target_modules={text!r} is not a regex: {error}. Name modules with commas instead."
        ) from None
    return text
