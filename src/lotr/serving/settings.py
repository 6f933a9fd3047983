"""What a server may be asked for, and how it gathers batches."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import ConfigError
from ..training.settings import setting

_LIMITS = "Limits"


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server, and what opens it.

    Args:
        token: What clients must send; `None` lets everyone in.
        admin_token: What those must send who add and remove tasks; `None` lets nobody.

    Raises:
        ConfigError: A limit lets no request through.
    """

    max_batch: int = setting(32, _LIMITS, "Rows that run at once.")
    max_wait: float = setting(5.0, _LIMITS, "Milliseconds that a row waits for others.")
    max_queue: int = setting(1024, _LIMITS, "Rows that wait at most; further requests get the answer 429.")
    max_texts: int = setting(64, _LIMITS, "Texts of one request.")
    max_tokens: int = setting(512, _LIMITS, "Longest answer of a language model, in tokens.")
    max_body: int = setting(1 << 20, _LIMITS, "Bytes of a request.")
    max_upload: int = setting(64 << 20, _LIMITS, "Bytes of a task that is sent, unpacked.")
    timeout: float = setting(30.0, _LIMITS, "Seconds that a request may take.")
    token: str | None = setting(None, "", "")
    admin_token: str | None = setting(None, "", "")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int | float) and (value < 0 or (value == 0 and limit.name != "max_wait")):
                raise ConfigError(f"{limit.name}={value} lets no request through. Use a larger number.")
        if self.max_queue < self.max_texts:
            raise ConfigError(
                f"max_queue={self.max_queue} rows are fewer than max_texts={self.max_texts} of one request, which "
                "could never be served. Raise the one, or lower the other."
            )
