"""A task as it is kept: plain values and a checksum over all of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Row:
    """One row of the file.

    Args:
        name: Its name.
        dtype: Type of its numbers.
        created: When it was written, in seconds since 1970.
        error: What rounding to `dtype` cost, relative.
        about: JSON with everything that is no number.
        numbers: Its cores.
        head: Its head as a safetensors file; empty without one.
        checksum: Of all the above.
    """

    name: str
    dtype: str
    created: float
    error: float
    about: str
    numbers: bytes
    head: bytes
    checksum: bytes = b""

    def sealed(self, name: str | None = None) -> Row:
        """Return the row with its checksum, under another name if one is given."""
        renamed = self if name is None else replace(self, name=name)
        return replace(renamed, checksum=renamed._sum())

    @property
    def is_whole(self) -> bool:
        """Whether every byte is the one that was written."""
        return self.checksum == self._sum()

    def _sum(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for field in fields(self)[:-1]:
            value = getattr(self, field.name)
            plain = value if isinstance(value, bytes) else str(value).encode()
            digest.update(len(plain).to_bytes(8, "little") + plain)
        return digest.digest()
