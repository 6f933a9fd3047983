"""`lotr serve` as a deployment of Ray Serve: replicas on any machines that see the bank's folder.

A replica mixes the tasks of its requests into batches itself, so each serves every task, and none is routed to by task.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from ..training.tasks.served import load_served
from .app import create_app
from .gate import Gate
from .metrics import log_to_stderr
from .settings import ServeSettings


def bank_deployment(
    bank: str,
    settings: ServeSettings | None = None,
    model: str | None = None,
    dtype: str = "float32",
    capacity: int | str = 1024,
    **options: Any,
) -> serve.Application:
    """Return the application for `ray.serve.run`.

    Args:
        bank: Its folder, the same on every machine.
        settings: Limits and tokens, those of each replica.
        model: Base model to use instead of the recorded one.
        dtype: Type of the base model.
        capacity: Tasks in memory of a replica, a number or bytes.
        options: Of the deployment, such as `num_replicas` and `ray_actor_options`.
    """
    limits = settings or ServeSettings()

    def build() -> Gate:  # in the replica
        log_to_stderr()
        return create_app(load_served(bank, model, capacity=capacity, dtype=dtype), limits)

    deployment = serve.deployment(serve.ingress(build)(), name="bank")
    application: serve.Application = deployment.options(
        max_ongoing_requests=limits.max_queue, **options
    ).bind()
    return application
