"""Every setting of a training run, described once: the options, the config file and the record come from here.

The command line shows its help from this file before torch is imported, so it imports the standard library and
`lotr.errors` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import ConfigError, near


def panel(name: str, usual: str = "") -> Callable[..., Any]:
    """Return what makes the fields of a panel of the help: `unset` says how the run decides what is left open."""

    def option(text: str, unset: str = usual, *, default: Any = None, shown: str | None = None) -> Any:
        shown = shown or (f"default: {unset}" if default is None else None)
        return field(default=default, metadata={"panel": name, "help": text, "shown": shown})

    return option


_data, _run = panel("Model and data"), panel("Run")
_adapter, _training = panel("Adapter", "by method"), panel("Training", "by method")


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

    model: str | None = _data(
        "Local folder, .gguf file, hub id, or packaged: `minilm` (all-MiniLM-L6-v2) or `smollm2` (SmolLM2-135M).",
        shown="required",
    )
    train: str | None = _data(
        "Training data: .csv, .tsv, .json, .jsonl, .parquet or .txt file, folder of files, hub data set (`glue/sst2`), "
        "or `docstrings` (built in).",
        shown="required",
    )
    eval: str | None = _data("Evaluation data.", "its own split, or a tenth held out")
    output: str | None = _data("Folder for the adapter and its reports.", shown="required")
    text: str = _data("Column with the text.", default="text")
    text2: str = _data("Column with the second text of a pair, if there is one.", default="text2")
    label: str = _data("Column with the label.", default="label")
    task: str | None = _data("classification, regression or causal-lm.", "guessed from the label")
    max_length: int | None = _data("Longest text, in tokens.", "128, or as many as the model takes")

    method: str | None = _adapter(
        "Row of `lotr methods`; or for comparison `peft_lora`, `peft_dora` (PEFT's own) and `head`.",
        "lotr, or as the basis",
    )
    rank: str | None = _adapter(
        "Rank of the shared factors: number, `k,r`, or `auto` with a budget.", "16, or as the basis"
    )
    budget: int | None = _adapter("Numbers that `--rank auto` may train.", "none")
    target_modules: str | None = _adapter(
        "Modules to adapt: names with commas, a regex, or `all-linear`.", "by architecture"
    )
    target_parameters: str | None = _adapter(
        "Parameters that hold the experts of a layer, `mlp.experts.down_proj`, with commas.", "none"
    )
    modes: str | None = _adapter("Shared along: any of `layer,projection,head,expert,task`; `site`; `none`.")
    core: str | None = _adapter("Structure of the cores: free, identity, tucker, cp, scaled_cp, tt.")
    core_ranks: str | None = _adapter(
        "Tucker cores: rank of every mode (`4`), or of each (`layer=8,head=4`).",
        "the rank, at most the mode's extent",
    )
    blocks: str | None = _adapter("How weights are cut: none, head, head_rows, square, head_or_square.")
    unequal: str | None = _adapter(
        "What unequal weights do that would share: grouped_query, slice (all use first rows), separate, error.",
        "grouped_query",
    )
    layers_per_group: int | None = _adapter("How many layers in order share factors, where layers do.", "all")
    magnitude: str | None = _adapter(
        "Rule on the whole weight: none, per_output, per_output_and_input, base_and_update."
    )
    trainable: str | None = _adapter("What trains: all, or cores (the factors stay as they start).")
    basis: str | None = _adapter(
        "Adapter whose factors are kept: its structure is taken, and only cores and a head train.", "none"
    )
    scaling: float | None = _adapter("σ: multiplies the update; not divided by rank.", "by method, mostly 1")
    alpha: float | None = _adapter("Instead of scaling: σ = alpha / rank.", "by method, mostly none")
    init: str | None = _adapter(
        "How the factors start: orthonormal, gaussian, kaiming, uniform, identity, weight, weight_values; or gradient, "
        "first_step, from the first batches.",
        "by method; gradient where cores alone train",
    )
    core_init: str | None = _adapter(
        "How the cores start: uniform, kaiming, xavier, tiny, identity.", "by method and structure"
    )
    zero: str | None = _adapter("What starts at zero, so that the update does: core, output, input, none.")
    lora_bias: bool | None = _adapter("Train biases too: a vector for each projection, which layers share.")
    start_batches: int | None = _adapter("Batches whose gradients a start from data takes.", "8")
    dropout: float = _adapter("Probability of dropping a number of the update.", default=0.0)
    dropout_place: str | None = _adapter(
        "What dropout drops: input, core_output, components, update (of ΔW).", "by method, mostly input"
    )

    lr: float | None = _training("Learning rate of the factors.", "3e-3, for decoders 1e-2")
    core_lr: float | None = _training("Learning rate of the cores.", "1e-2, alone 2e-2; less at large ranks")
    magnitude_lr: float | None = _training("Learning rate of the magnitudes.", "3e-3, sizes of map 1e-1")
    head_lr: float | None = _training("Learning rate of a new head.", "3e-2, for decoders 1e-4")
    head_warmup: int | None = _training(
        "Steps in which a new head trains alone, before the adapter starts.",
        "a fifth of the steps, at most 20, where a head is new",
    )
    epochs: float = _training("Passes over the training data.", default=3.0)
    max_steps: int | None = _training("Steps, instead of epochs.", "by epochs")
    batch_size: int = _training("Rows a forward pass and device.", default=32)
    gradient_accumulation_steps: int = _training("Forward passes whose gradients make one step.", default=1)
    packing: bool = _training("Texts of a batch in one row, without padding; causal-lm alone.", default=False)
    scheduler: str = _training(
        "How the rates go on after the warm-up: linear, cosine, constant_with_warmup, …", default="linear"
    )
    warmup: float = _training("Share of the steps in which the rates rise.", default=0.06)
    weight_decay: float = _training("Weight decay of AdamW.", default=0.0)
    adam_beta2: float = _training("Decay of the second moments of AdamW.", default=0.999)
    clip_updates: bool | None = _training(
        "Keep steps of AdamW from growing past their rate, by which runs go astray.",
        "for models that generate",
    )
    gradient_checkpointing: bool = _training("Recompute activations to save memory.", default=False)
    dtype: str = _training("Type of the base model: float32, bfloat16, float16.", default="float32")
    load_in: str | None = _training("Quantise the base model: 4bit or 8bit, by bitsandbytes.", "none")
    seed: int = _training("Seed of everything random.", default=0)

    eval_steps: int | None = _run("Steps between evaluations and checkpoints.", "five a run")
    resume: bool = _run("Go on from the last checkpoint in OUTPUT.", default=False)
    overwrite: bool = _run("Replace an output folder that is not empty.", default=False)
    push_to_hub: str | None = _run("Repository on the hub that the result is uploaded to.", "none")
    report_to: str = _run("Where it logs to: none, tensorboard (in OUTPUT/runs), wandb, …", default="none")

    #: Kind of the configuration that a run was given, in place of the settings of an adapter.
    configuration: str | None = field(default=None, metadata={"panel": ""})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the run as plain values, without those that a configuration stood in place of."""
        values = super().to_dict()
        passed_over = set() if self.configuration is None else set(OF_ADAPTER) - {"method", "rank", *OF_START}
        return {name: value for name, value in values.items() if name not in passed_over}


#: Settings that describe an adapter; and those of them that say how a run starts it.
OF_ADAPTER = [f.name for f in fields(TrainSettings) if f.metadata["panel"] == "Adapter"]
OF_START = ("init", "start_batches")


def with_usual(settings: TrainSettings) -> TrainSettings:
    """Return settings with a method and a rank, for an adapter that takes them from no basis."""
    return replace(settings, method=settings.method or "lotr", rank=settings.rank or "16")


def read_options(
    options: Mapping[str, Any], file: str | Path | None = None, kind: type[Settings] = TrainSettings
) -> dict[str, Any]:
    """Return the settings that were named: options, where they are not `None`, over a YAML file."""
    known = kind.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"{name!r} is not a setting. {near(name, known)}")
    values = {} if file is None else typed(kind, load_yaml(Path(file)), str(file))
    named = {name: value for name, value in options.items() if value is not None}
    return values | typed(kind, named, "The settings")


def load_yaml(path: Path) -> Any:
    """Read YAML, or JSON, without tags of Python's; what cannot be read is a ConfigError of one line.

    Keys are text as it is written, `no` and `010` too, and each is there once.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Return a mapping by the text of its keys."""
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    key.tag = "tag:yaml.org,2002:str"
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} is there twice", key.start_mark
                        )
                    seen.add(key.value)
            return dict(super().construct_mapping(node, deep))

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}. Name a file"
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        # of dates that are none, too
        problem = f"is not valid YAML: {' '.join(str(error).split())}"
    raise ConfigError(f"{path} {problem}.")


def typed(kind: type, content: Any, where: str) -> dict[str, Any]:
    """Return what a file holds for a dataclass, in the types of its fields; a ConfigError begins with `where`."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must hold settings by name, for example `rank: 16`.")
    known = {f.name: str(f.type) for f in fields(kind)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where} names {name!r}, which is not a setting. {near(name, known)}")
        of, *nothing = known[name].split(" | ")
        try:
            values[name] = None if value is None and nothing else _cast(value, of)
        except (OverflowError, TypeError, ValueError):
            raise ConfigError(f"{where}: {name}={str(value)[:80]!r} is not a value of type {of}.") from None
    return values


def _cast(value: Any, kind: str) -> Any:
    """Return a YAML value in the type of its setting; YAML reads `1e-3` as text and `16` as a number."""
    if kind.startswith("tuple"):
        return tuple(dict(part) for part in value)
    if isinstance(value, dict):
        value = ",".join(f"{key}={part}" for key, part in value.items())
    if isinstance(value, list | tuple | set):
        value = ",".join(str(part) for part in (sorted(value) if isinstance(value, set) else value))
    if value is None or isinstance(value, bool) != (kind == "bool"):
        raise TypeError
    if kind == "int" and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if kind == "str" and not isinstance(value, str | int | float | PathLike | date):
        raise TypeError
    return {"int": int, "float": float, "str": str, "bool": bool}[kind](value)


def read_modes(text: str | None) -> tuple[str, ...] | None:
    """Read coordinates with commas, `layer, projection`; `none` shares nothing."""
    return None if text is None else tuple(mode for mode in read_names(text) or () if mode != "none")


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
