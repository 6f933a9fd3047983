"""Several processes give what one process gives."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ENGINES = ["ddp", "ddp-checkpointed", "fsdp2", "fsdp2-checkpointed"]
ADAPTERS = ["free", "tucker", "train", "cores", "magnitude", "trained-norms", "experts"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def launch(processes: int, script: str, *words: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [*command, str(HERE / script), *words], capture_output=True, text=True, env=environment, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_two_processes_start_from_the_batches_of_both() -> None:
    """Also where a batch reaches some modules only."""
    equal = dict(line.split() for line in launch(2, "distributed_init.py").splitlines())
    assert equal == dict.fromkeys(("both", "an-expert-each", "unequal"), "True")


def assert_as_one(processes: int, cases: list[str]) -> None:
    """Losses, gradients of the last step, numbers at the end, those in files, and those read from shards."""
    worst = json.loads(launch(processes, "distributed_worker.py", *cases).splitlines()[-1])
    assert list(worst) == cases
    for case, differences in worst.items():
        assert {"losses", "gradients", "numbers", "saved"} <= differences.keys(), case
        assert ("resumed" in differences) == case.startswith("fsdp2")
        assert max(differences.values()) < 1e-5, (case, differences)


def test_two_processes_train_the_same_numbers_as_one() -> None:
    assert_as_one(2, [f"{engine} free" for engine in ENGINES])


@pytest.mark.engines
@pytest.mark.parametrize("processes", [2, 3])
def test_every_core_trains_in_several_processes_as_in_one(processes: int) -> None:
    assert_as_one(processes, [f"{engine} {adapter}" for engine in ENGINES for adapter in ADAPTERS])


@needs_deepspeed
@pytest.mark.engines
@pytest.mark.parametrize("processes", [2, 3])
def test_every_core_trains_under_zero_as_in_one_process(processes: int) -> None:
    cases = [f"{engine} {adapter}" for engine in ("zero2", "zero3") for adapter in ADAPTERS]
    assert_as_one(processes, [case for case in cases if case != "zero3 experts"])  # which are refused
