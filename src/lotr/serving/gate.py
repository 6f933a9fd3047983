"""What every request passes before the application sees it: token, size, deadline; and its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import LOG, Metrics, log
from .problems import Problem, event, problem_of
from .settings import ServeSettings

_LAST_WORD = 1.0  # seconds, past the deadline, for the error that ends a stream
_OPEN = ("/", "/healthz", "/readyz")  # they tell nothing of anybody


class Gate:
    """Lets a request through with its whole body, or answers it itself.

    The application is cancelled when the deadline has passed or the client has left. The path is taken as it was sent,
    so that a task whose name has a slash is still one part of it.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, bank: Path) -> None:
        self.app, self.settings, self.metrics, self.bank = app, settings, metrics, bank

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        began, status, streams = time.monotonic(), 0, False
        scope["state"] = {**scope.get("state", {}), "log": {}}

        async def counted(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
                streams = headers.get("content-type", "").startswith("text/event-stream")
            await send(message)

        predicts = path.count("/") == 4 and path.endswith("/predict")  # a task can be called so
        changes = path.startswith("/v1/tasks/") and not predicts and scope["method"] != "GET"
        try:
            self._check_token(scope, changes)
            async with asyncio.timeout(self.settings.timeout):
                most = self.settings.max_upload if changes else self.settings.max_body
                body = await _body(receive, most)
                await _unless_gone(self.app(scope, _replay(body), counted), receive)
        except Exception as error:
            problem = problem_of(error, self.bank)
            if problem.status == 500:
                LOG.exception("failed", extra={"fields": {"path": path}})
            if not status:
                await problem.response()(scope, receive, counted)
            elif streams:
                with suppress(TimeoutError):  # of a client that does not read
                    async with asyncio.timeout(_LAST_WORD):
                        await send({"type": "http.response.body", "body": event(problem.body())})
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            seconds, status = time.monotonic() - began, status or 499
            self.metrics.request(route, status, seconds)
            client = (scope.get("client") or ("",))[0]
            fields = {"method": scope["method"], "route": route, "status": status, "client": client}
            log("request", **fields, ms=round(1000 * seconds, 1), **scope["state"]["log"])

    def _check_token(self, scope: Scope, changes: bool) -> None:
        settings = self.settings
        if changes and settings.admin_token is None:
            raise Problem(403, "Tasks cannot be changed here: the server was started without --admin-token.")
        token = settings.admin_token if changes else settings.token
        scheme, _, sent = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        sent = sent.strip() if scheme.lower() == b"bearer" else b""
        if token is not None and scope["path"] not in _OPEN and not hmac.compare_digest(sent, token.encode()):
            name = "the token of --admin-token" if changes else "a token"
            message = f"This needs {name}: send the header Authorization: Bearer TOKEN."
            raise Problem(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _body(receive: Receive, most: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(499, "The client has left.")
        more = message.get("more_body", False)
        body += message.get("body", b"")
        if len(body) > most:
            text = f"The request is longer than {most:,} bytes. Send fewer texts."
            raise Problem(413, text, code="too_large")
    return bytes(body)


def _replay(body: bytes) -> Receive:
    """Return what gives a body that was read already; the gate itself sees clients leave."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Future()

    return receive


async def _unless_gone(answer: Awaitable[None], receive: Receive) -> None:
    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.create_task(leave())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Problem(499, "The client has left.")
        answering.result()
    finally:
        leaving.cancel()
        if answering.cancel():  # what it sends last comes before what the gate says
            await asyncio.wait({answering})
