"""The server as a deployment of Ray Serve (`make test-ray`): replicas share the bank's folder."""

# the server needs packages of extras, so they are asked for before it is imported
# ruff: noqa: E402
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
ray = pytest.importorskip("ray", reason="ray is not installed: make test-ray")
serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed: make test-ray")

import banks
from banks import encoder_bank
from lotr.serving.ray import bank_deployment
from lotr.serving.settings import ServeSettings
from servers import Client, serving

PORT = 8765


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ray")
    encoder_bank(folder, tasks=3).close()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
    serve.run(bank_deployment(str(folder / "bank"), ServeSettings(token="secret"), **options))
    yield folder
    serve.shutdown()
    ray.shutdown()


def test_replicas_answer_as_one_server_does(folder: Path) -> None:
    replicas = Client(PORT, "secret")
    with serving(folder) as single:
        for n in range(12):
            answer, expected = (one.predict(f"task-{n % 3}", "the red thing") for one in (replicas, single))
            assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    assert Client(PORT).send("GET", "/v1/models")[0] == 401
    assert replicas.send("POST", "/v1/tasks/none/predict", {"text": "a"})[0] == 404
    assert replicas.send("POST", "/v1/tasks/task-1/predict", b"{")[0] == 400


def test_a_task_that_is_added_is_there_in_every_replica(folder: Path) -> None:
    from lotr import CoreBank

    with CoreBank.open(folder / "bank", writable=True) as bank:
        bank.add(banks.task(bank, "a/b", 5, labels=("x", "y")))
    for _ in range(8):
        assert set(Client(PORT, "secret").predict("a%2Fb", "a")["scores"]) == {"x", "y"}
