"""Pico models: five real architectures, made from their configs in milliseconds, always with the same numbers.

torch and transformers are imported where they are used, because pytest reads this file in a process that runs no test
before it starts those that do.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCABULARY = 61
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


@dataclass(frozen=True)
class Architecture:
    """A pico model, what it is fed, and which of its modules an adapter takes."""

    make: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: list[str]
    n_targets: int


_made: dict[object, tuple[bytes, dict[int, Tensor]]] = {}


def seeded(cls: type[nn.Module], config: Any) -> nn.Module:
    """A model with the same numbers at every call: made once and copied, by pickle, which is quicker than deepcopy."""
    import torch

    key = cls, config.to_json_string(use_diff=False), torch.get_default_device(), torch.get_default_dtype()
    if key not in _made:
        tensors: dict[int, Tensor] = {}

        def aside(value: object) -> int | None:
            if not isinstance(value, torch.Tensor):
                return None
            tensors[id(value)] = value
            return id(value)

        with torch.random.fork_rng():
            torch.manual_seed(0)
            pickler = pickle.Pickler(content := io.BytesIO())
            pickler.persistent_id = aside
            pickler.dump(cls(config).eval())
        _made[key] = content.getvalue(), tensors
    packed, tensors = _made[key]
    unpickler = pickle.Unpickler(io.BytesIO(packed))
    unpickler.persistent_load = copy.deepcopy(tensors).__getitem__
    model: nn.Module = unpickler.load()
    return model


def pico(name: str, **fields: Any) -> nn.Module:
    """A model of transformers by the name of its class, from the fields of its configuration."""
    import transformers as tf

    cls = getattr(tf, name)
    return seeded(cls, cls.config_class(**fields))


def bert(**fields: Any) -> nn.Module:
    asked = {"vocab_size": VOCABULARY, "num_labels": 3, **SIZES, **fields}
    return pico("BertForSequenceClassification", **asked)


def llama(**fields: Any) -> nn.Module:
    """Grouped-query attention: keys and values are half as wide as queries."""
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return pico("LlamaForCausalLM", **{"vocab_size": VOCABULARY, **SIZES, **more, **fields})


def gpt2(**fields: Any) -> nn.Module:
    """Conv1D: weights are stored transposed."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return pico("GPT2LMHeadModel", bos_token_id=1, eos_token_id=2, **{**sizes, **fields})


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return pico("T5ForConditionalGeneration", **sizes, decoder_start_token_id=0)


def vit(**fields: Any) -> nn.Module:
    asked = {"image_size": 16, "patch_size": 8, "num_labels": 3, **SIZES, **fields}
    return pico("ViTForImageClassification", **asked)


def one_layer(make: Callable[[], nn.Module]) -> nn.Module:
    """The first layer of a pico model is enough for a compiler, which takes seconds a layer."""
    model = make()
    model.config.num_hidden_layers = 1
    return seeded(type(model), model.config)


def tokens(rows: int = 4, length: int = 7, seed: int = 0) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def _text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def _text_to_text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=1)}


def _images() -> dict[str, Tensor]:
    import torch

    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


ARCHITECTURES = {
    "bert": Architecture(bert, _text, ["query", "value"], 6),
    "llama": Architecture(llama, _text, ["q_proj", "v_proj", "down_proj"], 9),
    "gpt2": Architecture(gpt2, _text, ["c_attn", "c_fc"], 6),
    "t5": Architecture(t5, _text_to_text, ["q", "v"], 12),
    "vit": Architecture(vit, _images, ["q_proj", "v_proj"], 6),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Half a million objects of the libraries stay: the garbage collector need not look at them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_no_pictures() -> Iterator[None]:
    """Pictures are empty files: painting one takes longer than most tests."""
    import torch

    from lotr.adapters import plots

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "paint", plots.save, raising=False)
        patch.setattr(plots, "save", lambda figure, path: path.write_bytes(b""))
        yield


@contextmanager
def painted() -> Iterator[None]:
    """Inside, pictures are painted."""
    from lotr.adapters import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", plots.paint)
        yield


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small saved model, and rows that it learns: `bert`, `train.csv` (96 rows), `dev.csv` (48)."""
    import saved_models

    folder = tmp_path_factory.mktemp("place")
    saved_models.save_bert(folder / "bert")
    saved_models.write_colours(folder / "train.csv", rows=96, seed=0)
    saved_models.write_colours(folder / "dev.csv", rows=48, seed=1)
    return folder
