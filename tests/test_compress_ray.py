"""A fit on a Ray cluster; `make test-ray` runs it, with Ray installed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lotr
from conftest import bert
from loras import lora
from lotr.compression import ray as fit_ray
from lotr.errors import ConfigError

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")


def _assert_same_banks(one: Path, other: Path) -> None:
    with lotr.CoreBank.open(one) as expected, lotr.CoreBank.open(other) as actual:
        for key, tensor in expected.basis.factors().items():
            torch.testing.assert_close(actual.basis.factors()[key], tensor, rtol=1e-5, atol=1e-6)
        names = list(expected.names())
        torch.testing.assert_close(actual.read(names)[0], expected.read(names)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("core", "clusters"), [("free", 1), ("diagonal", 1), ("free", 2)])
def test_a_cluster_makes_the_bank_of_one_process(core: str, clusters: int, tmp_path: Path) -> None:
    for n in range(9):
        lora(tmp_path / f"task-{n}", n, r=1 + n % 3)
    options: Any = {"rank": 4, "core": core, "clusters": clusters, "modes": ("task", "layer")}
    options |= {"dtype": "float32", "sweeps": 6}
    alone, spread = (
        lotr.compress([tmp_path / "task-*"], tmp_path / f"bank-{where}", bert(), ray=where, **options)
        for where in (None, "local")
    )
    assert spread.by_module == pytest.approx(alone.by_module, rel=1e-7)
    _assert_same_banks(tmp_path / "bank-None", tmp_path / "bank-local")


def test_workers_that_are_killed_in_the_middle_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster of two machines that runs already; two workers die, in different passes."""
    from ray.cluster_utils import Cluster

    for n in range(9):
        lora(tmp_path / f"task-{n}", n)
    options: Any = {"rank": 4, "dtype": "float32"}
    lotr.compress([tmp_path / "task-*"], tmp_path / "expected", bert(), **options)
    deaths, add_up_here = tmp_path / "deaths", fit_ray._added_up
    deaths.mkdir()

    def dies_once(add_up: Any, shard: Any) -> Any:
        place = deaths / f"{add_up.func.__name__}-{shard[0].entries[0].name}"
        if place.name in ("moments_of-task-4", "_inside-task-7") and not place.exists():
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return add_up_here(add_up, shard)

    monkeypatch.setattr(fit_ray, "_added_up", dies_once)
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    machines.add_node(num_cpus=1)
    try:
        lotr.compress([tmp_path / "task-*"], tmp_path / "bank", bert(), ray=machines.address, **options)
    finally:
        machines.shutdown()
    assert len(list(deaths.iterdir())) == 2
    _assert_same_banks(tmp_path / "expected", tmp_path / "bank")


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    for name in "ab":
        lora(tmp_path / name)
    with pytest.raises(ConfigError, match=r"--ray 127.0.0.1:9 does not answer.*`local`"):
        lotr.compress([tmp_path / "a", tmp_path / "b"], tmp_path / "bank", bert(), ray="127.0.0.1:9")
    assert not (tmp_path / "bank").exists()
