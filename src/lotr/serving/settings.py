"""What a server may be asked for, and how it gathers batches."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server.

    Args:
        max_batch: Rows that run at once.
        max_wait: Milliseconds that a row waits for others.
        max_queue: Rows that wait at most.
        max_texts: Texts of one request.
        max_tokens: Longest answer of a language model, in tokens.
        max_body: Bytes of a request.
        max_upload: Bytes of a task that is sent, unpacked.
        timeout: Seconds that a request may take, from its first byte to the answer.
        token: What clients must send; `None` lets everyone in.
        admin_token: What those must send who add and remove tasks; `None` lets nobody.

    Raises:
        ConfigError: A limit leaves nothing.
    """

    max_batch: int = 32
    max_wait: float = 5.0
    max_queue: int = 1024
    max_texts: int = 64
    max_tokens: int = 512
    max_body: int = 1 << 20
    max_upload: int = 64 << 20
    timeout: float = 30.0
    token: str | None = None
    admin_token: str | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int | float) and value <= 0 and limit.name != "max_wait":
                raise ConfigError(f"{limit.name}={value} lets no request through. Use a number above 0.")
        if self.max_wait < 0:
            raise ConfigError(f"max_wait={self.max_wait} is no time. Use milliseconds, or 0 for no waiting.")
        if self.max_queue < self.max_texts:
            raise ConfigError(
                f"max_queue={self.max_queue} rows are fewer than max_texts={self.max_texts} of one request, which "
                "could never be served. Raise the one, or lower the other."
            )
