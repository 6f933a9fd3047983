"""Two gloo processes train one adapter, each on its half of the batch. Run by `test_tuner_distributed.py`."""

from __future__ import annotations

import gc
import sys

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from conftest import llama, tokens
from lotr import LotrConfig

STEPS = 3


def adapted() -> PeftModel:
    config = LotrConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False, seed=0)
    return get_peft_model(llama(), config)


def train(model: nn.Module, batch: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def shard(model: PeftModel) -> PeftModel:
    """FSDP2 as accelerate does it: every block, then the root, which holds the shared factors."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def checkpointed(model: PeftModel) -> PeftModel:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


WAYS = {
    "ddp": lambda: DistributedDataParallel(adapted()),
    "ddp-checkpointed": lambda: DistributedDataParallel(checkpointed(adapted())),
    "fsdp2": lambda: shard(adapted()),
    "fsdp2-checkpointed": lambda: shard(checkpointed(adapted())),
}


def main() -> None:
    batch = tokens(4)
    single = adapted()
    train(single, batch)
    expected = {n: p.detach() for n, p in single.named_parameters() if p.requires_grad}

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for way in sys.argv[1:]:
        model = WAYS[way]()
        train(model, batch[2 * rank : 2 * rank + 2])
        found = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == expected.keys()
        worst = 0.0
        for name, parameter in found.items():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            worst = max(worst, (full.detach() - expected[name]).abs().max().item())
        if rank == 0:
            print(way, worst)
        # a wrapper that outlives the process group can abort at exit, and wrappers are reference cycles
        del model, found, parameter, full
        gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
