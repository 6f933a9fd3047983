"""Checkpoints that cannot train shared factors are refused before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from conftest import llama, tokens
from lotr import LotrConfig
from lotr.errors import TrainingError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointed(reentrant: bool, **fields: Any) -> PeftModel:
    model = get_peft_model(
        llama(), LotrConfig(r=4, task_type="CAUSAL_LM", init_weights=False, **fields)
    ).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def step(model: Any) -> None:
    model(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize(
    "fields", [{}, {"method": "lotr_joint", "core": "tucker", "target_modules": ["q_proj"]}]
)
def test_reentrant_checkpoints_in_several_processes_are_refused_with_the_way_out(
    fields: Any, one_process: None
) -> None:
    model = checkpointed(True, **fields)
    with pytest.raises(TrainingError, match=r'"use_reentrant": False'):
        step(DistributedDataParallel(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "reentrant, fields, options",
    [
        (False, {}, {}),
        (True, {}, {"static_graph": True}),
        (True, {"method": "lora"}, {}),  # shares nothing
        (True, {"trainable": "cores"}, {}),  # the factors stay as they are
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:trainable='cores'")
def test_the_ways_out_train_the_gradients_of_one_process(
    reentrant: bool, fields: Any, options: Any, one_process: None
) -> None:
    alone, model = (checkpointed(reentrant, seed=0, **fields) for _ in range(2))
    step(alone)
    parallel = DistributedDataParallel(model, **options)
    for _ in range(2):
        model.zero_grad()
        step(parallel)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5)
