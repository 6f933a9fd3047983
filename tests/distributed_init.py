"""Two gloo processes start one adapter from batches of their own. Run by `test_tuner_distributed.py`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

import lotr
from lotr import LotrConfig


class Routed(nn.Module):
    """A batch goes through one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, expert: int) -> SimpleNamespace:
        y = (self.second if expert else self.first)(self.shared(x).tanh())
        return SimpleNamespace(loss=(y - 1).square().mean())


def started(batches: list[dict[str, object]]) -> torch.Tensor:
    model = get_peft_model(Routed(), LotrConfig(r=4, target_modules=["shared", "first", "second"], seed=0))
    lotr.init_from_data(model, batches)
    return torch.cat(
        [p.detach().flatten() for n, p in model.named_parameters() if "lotr_U" in n or "lotr_V" in n]
    )


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank + 1)
    batches = [{"x": torch.randn(4, 8), "expert": (n + rank) % 2} for n in range(6)]
    for name, own in (("both", batches), ("an-expert-each", batches[::2]), ("unequal", batches[rank:])):
        numbers = started(own)
        of_all = [torch.empty_like(numbers) for _ in range(2)]
        dist.all_gather(of_all, numbers)
        if rank == 0:
            print(name, torch.equal(*of_all))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
