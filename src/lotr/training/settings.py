"""Every setting of a training run, described once: the options, the config file and the record come from here.

The command line shows its help from this file before torch is imported (`lotr_cli.light`), so it imports the standard
library and `lotr.errors` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, near


def setting(default: Any, panel: str, text: str, shown: str | None = None) -> Any:
    """Return a field with its help; `shown` describes a default that depends on other settings."""
    return field(default=default, metadata={"panel": panel, "help": text, "shown": shown})


_DATA, _ADAPTER, _TRAINING, _RUN = "Model and data", "Adapter", "Training", "Run"


@dataclass(frozen=True)
class TrainSettings:
    """What `lotr train` is told. Fields left at `None` are decided by the run, which says how."""

    model: str | None = setting(
        None, _DATA, "Local folder, hub id, or `minilm` (packaged all-MiniLM-L6-v2).", "required"
    )
    train: str | None = setting(
        None,
        _DATA,
        "Training data: .csv, .tsv, .json, .jsonl or .parquet file, saved datasets folder, hub data set (`glue/sst2`), "
        "or `docstrings` (built in).",
        "required",
    )
    eval: str | None = setting(None, _DATA, "Evaluation data.", "default: its own split, or a tenth held out")
    output: str | None = setting(None, _DATA, "Folder for the adapter and its reports.", "required")
    text: str = setting("text", _DATA, "Column with the text.")
    text2: str = setting("text2", _DATA, "Column with the second text of a pair, if there is one.")
    label: str = setting("label", _DATA, "Column with the label.")
    task: str | None = setting(
        None, _DATA, "classification, regression or causal-lm.", "default: guessed from the label"
    )
    max_length: int | None = setting(
        None, _DATA, "Longest text, in tokens.", "default: 128, or as many as the model takes"
    )

    method: str = setting(
        "lotr",
        _ADAPTER,
        "Row of `lotr methods`; or for comparison `peft_lora`, `peft_dora` (PEFT's own) and `head`.",
    )
    rank: str = setting(
        "16", _ADAPTER, "Rank of the shared factors: one number, `k,r`, or `auto` with a budget."
    )
    budget: int | None = setting(
        None,
        _ADAPTER,
        "Numbers that `--rank auto` may train.",
        "default: none",
    )
    target_modules: str | None = setting(
        None,
        _ADAPTER,
        "Modules to adapt: names with commas, a regex, or `all-linear`.",
        "default: by architecture",
    )
    modes: str | None = setting(
        None,
        _ADAPTER,
        "What shares factors: any of `layer,projection,head`; `site`; or `none`.",
        "default: by method",
    )
    core: str | None = setting(
        None, _ADAPTER, "Structure of the cores: free, identity, tucker, cp, tt.", "default: by method"
    )
    core_ranks: str | None = setting(
        None,
        _ADAPTER,
        "Tucker cores: rank of every mode (`4`), or of each (`layer=8,head=4`).",
        "default: the rank, at most the mode's extent",
    )
    blocks: str | None = setting(
        None, _ADAPTER, "How weights are cut: none, head, square.", "default: by method"
    )
    magnitude: str | None = setting(
        None,
        _ADAPTER,
        "Rule on the whole weight: none, per_output, per_output_and_input, base_and_update.",
        "default: by method",
    )
    trainable: str | None = setting(
        None, _ADAPTER, "What trains: all, or cores (the factors stay as they start).", "default: by method"
    )
    basis: str | None = setting(
        None,
        _ADAPTER,
        "Adapter whose factors are kept: its structure is taken, and only cores and a head train.",
        "default: none",
    )
    scaling: float | None = setting(
        None, _ADAPTER, "σ: multiplies the update; not divided by the rank.", "default: by method, mostly 1"
    )
    init: str | None = setting(
        None,
        _ADAPTER,
        "How the factors start: orthonormal, gaussian, kaiming, weight; or gradient, from the first batches.",
        "default: by method; gradient where cores alone train",
    )
    start_batches: int | None = setting(
        None,
        _ADAPTER,
        "Batches whose gradients a start from data takes.",
        "default: 8",
    )
    dropout: float = setting(0.0, _ADAPTER, "Dropout on the input of the update.")

    lr: float | None = setting(None, _TRAINING, "Learning rate of the factors.", "default: by method")
    core_lr: float | None = setting(None, _TRAINING, "Learning rate of the cores.", "default: by method")
    magnitude_lr: float | None = setting(
        None, _TRAINING, "Learning rate of the magnitudes.", "default: by method"
    )
    head_lr: float | None = setting(None, _TRAINING, "Learning rate of a new head.", "default: by method")
    head_warmup: int | None = setting(
        None,
        _TRAINING,
        "Steps in which a new head trains alone, before the adapter starts.",
        "default: a fifth of the steps, at most 20, where a head is new",
    )
    epochs: float = setting(3.0, _TRAINING, "Passes over the training data.")
    max_steps: int | None = setting(None, _TRAINING, "Steps, instead of epochs.", "default: by epochs")
    batch_size: int = setting(32, _TRAINING, "Rows a step and device.")
    warmup: float = setting(0.06, _TRAINING, "Share of the steps in which the rates rise.")
    weight_decay: float = setting(0.0, _TRAINING, "Weight decay of AdamW.")
    gradient_checkpointing: bool = setting(False, _TRAINING, "Recompute activations to save memory.")
    dtype: str = setting("float32", _TRAINING, "Type of the base model: float32, bfloat16, float16.")
    seed: int = setting(0, _TRAINING, "Seed of everything random.")

    eval_steps: int | None = setting(
        None, _RUN, "Steps between evaluations and checkpoints.", "default: five a run"
    )
    resume: bool = setting(False, _RUN, "Go on from the last checkpoint in OUTPUT.")
    overwrite: bool = setting(False, _RUN, "Replace an output folder that is not empty.")
    report_to: str = setting("none", _RUN, "Where transformers logs to: none, tensorboard, wandb, …")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the run as plain values; how it was called is not one of them."""
        return {name: value for name, value in asdict(self).items() if name not in ("resume", "overwrite")}


S = TypeVar("S")


def read_settings(of: type[S], options: Mapping[str, Any], file: str | Path | None = None) -> S:
    """Build settings: options over a config file over the defaults; see `read_options`."""
    return of(**read_options(options, file, of))


def read_options(
    options: Mapping[str, Any], file: str | Path | None = None, of: type = TrainSettings
) -> dict[str, Any]:
    """Return the settings that were named, options over a config file.

    Args:
        options: Settings by name; `None` means not given.
        file: YAML file with any of the settings; dashes and underscores both do.
        of: `TrainSettings`, or another frozen dataclass whose fields are made by `setting`.

    Raises:
        ConfigError: The file is not a mapping, a setting does not exist, or a value of the file has another type.
    """
    known = {f.name: str(f.type) for f in fields(of)}
    values = {} if file is None else _read_yaml(Path(file), known)
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{name!r} is not a setting. {near(name, known)}")
        if value is not None:
            values[name] = value
    return values


def _read_yaml(path: Path, known: Mapping[str, str]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path} does not exist.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from None
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
    except ValueError:
        raise ConfigError(f"--config {path}: {name}={value!r} is not a value of type {kind}.") from None
