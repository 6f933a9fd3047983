"""Errors as clients get them: a status, and OpenAI's form of a body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse

from ..errors import CheckpointError, LotrError, UnknownTaskError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):
    """A request that cannot be answered: `param` is the field that is to blame, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def problem_of(error: Exception, bank: Path) -> Problem:
    """Return an error as clients get it: they do not learn where the bank is, and nothing of what nobody foresaw."""
    if isinstance(error, Problem):
        return error
    text = str(error).replace(str(bank), bank.name)
    if isinstance(error, UnknownTaskError):
        return Problem(404, text, "model", "model_not_found")
    if isinstance(error, CheckpointError):
        return Problem(500, text, "model", "task_damaged")
    if isinstance(error, LotrError):
        return Problem(400, text, code="bad_request")
    if isinstance(error, TimeoutError):
        return Problem(504, "The deadline has passed. Send fewer texts, or come back later.", code="timeout")
    return Problem(500, "The server failed; its log tells why.", code="internal_error")


def event(content: dict[str, Any]) -> bytes:
    """Return one event of a stream."""
    return f"data: {json.dumps(content)}\n\n".encode()
