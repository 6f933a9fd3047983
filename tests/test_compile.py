"""Adapted models compile as one graph, and compute what they compute uncompiled."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from conftest import bert, tokens
from lotr import LotrConfig

ROWS: list[dict[str, str]] = [
    *(
        {"method": name}
        for name in ("lotr", "lora", "dora", "bora", "map", "metatt_5d", "tenslora_att_qkv_depth")
    ),
    {"method": "lora_xs"},
    {"method": "lora_xs", "magnitude": "per_output"},  # frozen factors, of which products are kept
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_compiled_model_has_one_graph_and_the_same_gradients(row: dict[str, str]) -> None:
    torch._dynamo.reset()
    config = LotrConfig(**row, r=4, target_modules=["query", "value"], init_weights=False)
    model = get_peft_model(bert(), config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def run(call: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = call(input_ids=tokens()).logits
        logits.square().sum().backward()
        return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected)
