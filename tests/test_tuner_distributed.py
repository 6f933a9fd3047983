"""Two processes give what one process gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


STARTER = Path(__file__).with_name("distributed_init.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_start_from_the_batches_of_both() -> None:
    """Also where a batch reaches some modules only."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        str(STARTER),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    equal = dict(line.split() for line in result.stdout.splitlines())
    assert equal == dict.fromkeys(("both", "an-expert-each", "unequal"), "True")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_train_the_same_numbers_as_one() -> None:
    ways = ["ddp", "ddp-checkpointed", "fsdp2", "fsdp2-checkpointed"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
        *(str(WORKER), *ways),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    worst = dict(line.split() for line in result.stdout.splitlines())
    assert set(worst) == set(ways)
    assert max(map(float, worst.values())) < 1e-6, worst
