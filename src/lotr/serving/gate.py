"""What every request passes before the application sees it: token, size, deadline; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import LOG, Metrics, log
from .problems import Problem, problem_of
from .settings import ServeSettings

_OPEN = ("/", "/healthz", "/readyz")  # they tell nothing of anybody


class Gate:
    """Lets a request through with its whole body, or answers it itself.

    The path is taken as it was sent, so that a task whose name has a slash is still one part of it.

    Args:
        app: The application.
        settings: Limits and tokens.
        metrics: Where requests are counted.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["path"] = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        began, status, started = time.monotonic(), 499, False
        scope["state"] = {**scope.get("state", {}), "log": {}, "deadline": began + self.settings.timeout}

        async def counted(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        path, method = scope["path"], scope["method"]
        changes = path.startswith("/v1/tasks/") and not path.endswith("/predict") and method != "GET"
        try:
            self._check_token(scope, changes)
            most = self.settings.max_upload if changes else self.settings.max_body
            body = await self._body(scope, receive, most)
            await self.app(scope, _Replay(body, receive), counted)
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                LOG.exception("failed", extra={"fields": {"path": scope["path"]}})
            if not started:
                await problem.response()(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.monotonic() - began
            self.metrics.request(route, status, seconds)
            client = (scope.get("client") or ("",))[0]
            fields = {"method": scope["method"], "route": route, "status": status, "client": client}
            log("request", **fields, ms=round(1000 * seconds, 1), **scope["state"]["log"])

    def _check_token(self, scope: Scope, changes: bool) -> None:
        settings, path = self.settings, scope["path"]
        if changes and settings.admin_token is None:
            raise Problem(403, "Tasks cannot be changed here: the server was started without --admin-token.")
        token = settings.admin_token if changes else settings.token
        sent = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        if token is not None and path not in _OPEN and not hmac.compare_digest(sent, token.encode()):
            name = "the token of --admin-token" if changes else "a token"
            raise Problem(
                401,
                f"This needs {name}: send the header Authorization: Bearer TOKEN.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive, most: int) -> bytes:
        size = dict(scope["headers"]).get(b"content-length", b"0")
        parts, total, more = [], int(size) if size.isdigit() else 0, True
        while more and total <= most:
            remaining = scope["state"]["deadline"] - time.monotonic()
            message: dict[str, Any] = dict(await asyncio.wait_for(receive(), max(remaining, 0)))
            more = message["type"] == "http.request" and message.get("more_body", False)
            parts.append(message.get("body", b""))
            total = max(total, sum(map(len, parts)))
        if total > most:
            raise Problem(
                413, f"The request is longer than {most:,} bytes. Send fewer texts.", code="too_large"
            )
        return b"".join(parts)


class _Replay:
    """Gives a body that was read already, and then what the client does next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}
