"""Several processes give what one process gives."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ENGINES = ["ddp", "ddp-checkpointed", "fsdp2", "fsdp2-checkpointed"]
ADAPTERS = ["free", "tucker", "train", "cores", "magnitude", "trained-norms", "experts"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def launch(processes: int, cases: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    words = [*command, str(Path(__file__).with_name("distributed_worker.py")), *cases]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found["differences"]) == cases
    return found


@pytest.fixture(scope="module")
def in_two() -> dict[str, Any]:
    return launch(2, [f"{engine} free" for engine in ENGINES])


def test_two_processes_start_from_the_batches_of_both(in_two: dict[str, Any]) -> None:
    """Also where a batch reaches some modules only."""
    assert in_two["starts"] == dict.fromkeys(("both", "an-expert-each", "unequal"), True)


def assert_as_one(found: dict[str, Any]) -> None:
    """Losses, gradients of the last step, numbers at the end, those in files, and those read from shards."""
    for case, differences in found["differences"].items():
        assert {"losses", "gradients", "numbers", "saved"} <= differences.keys(), case
        assert ("resumed" in differences) == case.startswith("fsdp2")
        assert max(differences.values()) < 1e-5, (case, differences)


def test_two_processes_train_the_same_numbers_as_one(in_two: dict[str, Any]) -> None:
    assert_as_one(in_two)


@pytest.mark.engines
@pytest.mark.parametrize("processes", [2, 3])
def test_every_core_trains_in_several_processes_as_in_one(processes: int) -> None:
    assert_as_one(launch(processes, [f"{engine} {adapter}" for engine in ENGINES for adapter in ADAPTERS]))


@needs_deepspeed
@pytest.mark.engines
@pytest.mark.parametrize("processes", [2, 3])
def test_every_core_trains_under_zero_as_in_one_process(processes: int) -> None:
    cases = [f"{engine} {adapter}" for engine in ("zero2", "zero3") for adapter in ADAPTERS]
    assert_as_one(launch(processes, [case for case in cases if case != "zero3 experts"]))  # which are refused
