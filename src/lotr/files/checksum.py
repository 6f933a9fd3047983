"""A JSON file with a checksum of itself, and of files beside it: a changed byte is noticed, not understood."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CHECKSUM = "checksum"


def sealed(fields: Mapping[str, Any], *beside: Path) -> dict[str, Any]:
    """Return fields of a JSON file with a checksum of them, and of the bytes of files beside it.

    Example:
        >>> sealed({"r": 16})[CHECKSUM] == sealed({"r": 16, CHECKSUM: "old"})[CHECKSUM] != sealed({"r": 48})[CHECKSUM]
        True
    """
    plain = {key: value for key, value in fields.items() if key != CHECKSUM}
    digest = hashlib.sha256()
    for path in beside:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    # as it is read again: tuples are lists, and every key is text
    as_read = json.loads(json.dumps(plain, default=str))
    digest.update(json.dumps(as_read, sort_keys=True).encode())
    return {**plain, CHECKSUM: digest.hexdigest()}


def check_sealed(path: Path, fields: Mapping[str, Any], *beside: Path) -> None:
    """Refuse the fields of a JSON file, or files beside it, that are not those of its checksum; none is no error."""
    if CHECKSUM in fields and fields != sealed(fields, *beside):
        what = f"the checksum of {', '.join(file.name for file in (path, *beside))} differs"
        raise CheckpointError(
            f"{path.parent} is damaged, or was put together from different folders: {what}. Copy or download it again. "
            f"After a change by hand, take the line {CHECKSUM!r} out of {path.name}."
        )
