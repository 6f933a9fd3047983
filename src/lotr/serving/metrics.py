"""What a server tells Prometheus, and its log: one line of JSON a request."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
LOG = logging.getLogger("lotr.serving")


class Metrics:
    """Counters of one server. Names of tasks are no label: there may be a million."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.answered = 0
        self.requests = Counter("lotr_requests", "Requests.", ("route", "status"), registry=own)
        times = partial(Histogram, buckets=_SECONDS, registry=own)
        self.seconds = times("lotr_request_seconds", "Time of a request.", ("route",))
        self.waits = times("lotr_wait_seconds", "Time of a row in the queue.")
        self.rows = Counter("lotr_rows", "Rows that were answered.", ("kind",), registry=own)
        self.tokens = Counter("lotr_tokens", "Tokens that were written.", registry=own)
        self.batch_rows = Histogram("lotr_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=own)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is asked for when it is read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def batch(self, waits: Sequence[float]) -> None:
        """Count a batch whose rows have waited so long."""
        self.batch_rows.observe(len(waits))
        for wait in waits:
            self.waits.observe(wait)

    def request(self, route: str, status: int, seconds: float) -> None:
        self.answered += 1
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


def log(event: str, **fields: Any) -> None:
    """Write a line of the log."""
    LOG.info(event, extra={"fields": fields})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line of JSON."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{at}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr() -> None:
    """Write the log of the server, and uvicorn's, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    for name, level in (("lotr.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
