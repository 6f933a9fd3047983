"""Adapted models compile as one graph, and compute what they compute uncompiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from conftest import bert, gpt2, one_layer, tokens
from lotr import LotrConfig

#: Every magnitude, and every kind of core: an identity, a train, a Tucker tensor, and one between frozen factors.
ROWS: list[dict[str, str]] = [
    {"method": "lora"},
    {"method": "map"},
    {"method": "metatt_5d", "magnitude": "per_output_and_input"},
    {"method": "tenslora_att_qkv_depth", "magnitude": "per_output"},
    {"method": "lora_xs", "magnitude": "per_output"},  # products of the factors are kept
]


class Attention(nn.Module):
    """The projections of an attention, and nothing that takes a compiler time."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)
        self.num_attention_heads, self.attention_head_size = 4, 4

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.query(x)) * self.value(x)


def check(model: nn.Module, x: Tensor) -> None:
    """Compare a model with itself compiled, which must be one graph."""
    torch._dynamo.reset()

    def run(call: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        output = call(x)
        output = getattr(output, "logits", output)
        output.square().sum().backward()
        return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_compiled_layers_are_one_graph_with_the_same_gradients(row: dict[str, str]) -> None:
    base = nn.Sequential(Attention(), Attention())
    config = LotrConfig(**row, r=4, target_modules=["query", "value"], init_weights=False)
    model = get_peft_model(base, config).train()
    check(model, torch.randn(3, 5, 16))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make, targets", [(bert, ["query", "value"]), (gpt2, ["c_attn"])])
def test_a_compiled_transformer_is_one_graph_with_the_same_gradients(
    make: Callable[[], nn.Module], targets: list[str]
) -> None:
    base = one_layer(make)
    model = get_peft_model(base, LotrConfig(r=4, target_modules=targets, init_weights=False)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    check(model, tokens())
