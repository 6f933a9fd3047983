"""What a server may be asked for, and how it gathers batches."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError
from ..training.settings import panel

_limit, _own = panel("Limits"), panel("")


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server, and what opens it.

    Args:
        token: What clients must send; `None` lets everyone in.
        admin_token: What those must send who add and remove tasks; `None` lets nobody.

    Raises:
        ConfigError: A limit lets no request through, or a token lets everybody in.
    """

    max_batch: int = _limit("Rows that run at once.", default=32)
    max_wait: float = _limit("Milliseconds that a row waits for others.", default=5.0)
    max_queue: int = _limit("Rows that wait at most; further requests get the answer 429.", default=1024)
    max_texts: int = _limit("Texts of one request.", default=64)
    max_tokens: int = _limit("Longest answer of a language model, in tokens.", default=512)
    max_body: int = _limit("Bytes of a request.", default=1 << 20)
    max_upload: int = _limit("Bytes of a task that is sent, unpacked.", default=64 << 20)
    timeout: float = _limit("Seconds that a request may take.", default=30.0)
    token: str | None = _own("")
    admin_token: str | None = _own("")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int | float) and (value < 0 or (value == 0 and limit.name != "max_wait")):
                raise ConfigError(f"{limit.name}={value} lets no request through. Use a larger number.")
        for name in ("token", "admin_token"):
            if getattr(self, name) == "":
                raise ConfigError(
                    f"{name} is empty, which would let everybody in. Leave it out, or give one."
                )
        if self.max_queue < self.max_texts:
            raise ConfigError(
                f"max_queue={self.max_queue} rows are fewer than max_texts={self.max_texts} of one request, which "
                "could never be served. Raise the one, or lower the other."
            )
