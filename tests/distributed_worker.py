"""Gloo processes start and train adapters, each on its own batches. Run by `test_tuner_distributed.py`.

    torchrun --nproc-per-node 2 tests/distributed_worker.py 'fsdp2 tucker' 'zero3 cores'

Prints a line of JSON: whether all start alike, and for every engine and adapter the largest difference from one
process with the whole batch.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lotr
from conftest import llama, tokens
from lotr import LotrConfig
from lotr.files.adapter_folder import WEIGHTS
from moe_models import EXPERTS, qwen

STEPS, ROWS, RATE = 3, 6, 0.5
ADAPTERS: dict[str, dict[str, Any]] = {
    "free": {},
    "tucker": {"method": "lotr_joint", "core": "tucker"},
    "train": {"method": "metatt_4d"},
    "cores": {"trainable": "cores", "init": "orthonormal"},
    "magnitude": {"magnitude": "per_output"},
    "trained-norms": {"magnitude": "per_output", "norm_gradient": True},
    "experts": {"target_modules": None, "target_parameters": EXPERTS},
}
Result = dict[str, dict[str, Tensor]]  # what it is → by name


def adapted(adapter: str, seed: int = 0) -> PeftModel:
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False} | ADAPTERS[adapter]
    return get_peft_model(qwen() if adapter == "experts" else llama(), LotrConfig(**fields, seed=seed))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
    return {name: p for name, p in named if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def mean(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss


def saved(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what the adapter's file holds, as the first process writes it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state_dict)
        return load_file(Path(folder, WEIGHTS))


def train(model: nn.Module, batch: Tensor) -> Result:
    optimizer = torch.optim.SGD(trained(model).values(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        losses.append(mean(loss))
        optimizer.step()
    return {
        "losses": {"": torch.stack(losses)},
        "gradients": {name: whole(p.grad) for name, p in trained(model).items()},
        "numbers": {name: whole(p) for name, p in trained(model).items()},
    }


def alone(adapter: str, batch: Tensor) -> Result:
    model = adapted(adapter)
    return train(model, batch) | {"saved": saved(model)}


def checkpointed(model: PeftModel) -> PeftModel:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def ddp(model: PeftModel, batch: Tensor) -> Result:
    return train(DistributedDataParallel(model), batch) | {"saved": saved(model)}


def shard(model: PeftModel) -> PeftModel:
    """FSDP2 as accelerate does it: every block, then the root, which holds the shared factors."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def fsdp2(model: PeftModel, batch: Tensor, adapter: str) -> Result:
    result = train(shard(model), batch)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    files: list[Any] = [saved(model, full) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(files)
    return result | {"saved": files[0], "resumed": resumed(model, adapter)}


def resumed(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return the numbers of another sharded model that reads what every process wrote of its own shards."""
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    dcp.save(get_model_state_dict(model), checkpoint_id=folders[0])
    again = shard(adapted(adapter, seed=1))
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folders[0])
    set_model_state_dict(again, state)
    return {name: whole(p) for name, p in trained(again).items()}


def zero(stage: int, model: PeftModel, batch: Tensor) -> Result:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": len(batch),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(trained(model).values(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for _ in range(STEPS):
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        losses.append(mean(loss))
        gradients = {name: safe_get_full_grad(p).clone() for name, p in trained(model).items()}
        engine.step()
    full = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    files: list[Any] = [saved(model, full) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(files)
    return {
        "losses": {"": torch.stack(losses)},
        "gradients": gradients,
        "numbers": {name: safe_get_full_fp32_param(p).clone() for name, p in trained(model).items()},
        "saved": files[0],
    }


ENGINES: dict[str, Callable[[str, Tensor], Result]] = {
    "ddp": lambda adapter, batch: ddp(adapted(adapter), batch),
    "ddp-checkpointed": lambda adapter, batch: ddp(checkpointed(adapted(adapter)), batch),
    "fsdp2": lambda adapter, batch: fsdp2(adapted(adapter), batch, adapter),
    "fsdp2-checkpointed": lambda adapter, batch: fsdp2(checkpointed(adapted(adapter)), batch, adapter),
    "zero2": lambda adapter, batch: zero(2, adapted(adapter), batch),
    "zero3": lambda adapter, batch: zero(3, adapted(adapter), batch),
}


def differences(found: Result, expected: Result) -> dict[str, float]:
    """Return the largest difference, as a share of the largest number of its tensor."""
    expected = expected | {"resumed": expected["numbers"]}
    worst = {}
    for what, tensors in found.items():
        assert tensors.keys() == expected[what].keys(), what
        pairs = [(tensor, expected[what][name]) for name, tensor in tensors.items()]
        worst[what] = max(((t - e).abs().max() / e.abs().max()).item() for t, e in pairs)
    return worst


class Routed(nn.Module):
    """A batch goes through one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, expert: int) -> SimpleNamespace:
        y = (self.second if expert else self.first)(self.shared(x).tanh())
        return SimpleNamespace(loss=(y - 1).square().mean())


def started(batches: list[dict[str, Any]]) -> Tensor:
    model = get_peft_model(Routed(), LotrConfig(r=4, target_modules=["shared", "first", "second"], seed=0))
    lotr.init_from_data(model, batches)
    return torch.cat(
        [p.detach().flatten() for n, p in model.named_parameters() if "lotr_U" in n or "lotr_V" in n]
    )


def starts(rank: int) -> dict[str, bool]:
    """Whether all processes start from the same factors, each with batches of its own."""
    torch.manual_seed(rank + 1)
    batches = [{"x": torch.randn(4, 8), "expert": (n + rank) % 2} for n in range(6)]
    equal = {}
    for name, own in (("both", batches), ("an-expert-each", batches[::2]), ("unequal", batches[rank:])):
        numbers = started(own)
        of_all = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, numbers)
        equal[name] = all(torch.equal(each, numbers) for each in of_all)
    return equal


def main(cases: list[str]) -> None:
    batch, adapters = tokens(ROWS), {case.split()[1] for case in cases}
    expected = {adapter: alone(adapter, batch) for adapter in adapters}
    dist.init_process_group("gloo")
    rank, each = dist.get_rank(), ROWS // dist.get_world_size()
    equal, worst = starts(rank), {}
    for case in cases:
        engine, adapter = case.split()
        found = ENGINES[engine](adapter, batch[each * rank : each * (rank + 1)])
        worst[case] = differences(found, expected[adapter])
        gc.collect()  # a wrapper that outlives the process group can abort at exit, and wrappers are reference cycles
    if rank == 0:
        print(json.dumps({"starts": equal, "differences": worst}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
