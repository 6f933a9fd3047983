"""The application: its routes, and what runs behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from ..bank import CoreBank
from ..training.tasks.served import Served
from .batcher import Batcher, answers_of
from .bodies import Chat, Completion, Embed, Texts
from .completions import Writing
from .decoder import Continuation, Decoder
from .gate import Gate
from .metrics import Metrics
from .predictor import Predictor, check_pooling, in_openai_form
from .problems import Problem, problem_of
from .settings import ServeSettings
from .upload import add_archive

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


async def _task_name(task: str) -> str:  # asynchronous, or every request would wait for a thread
    return unquote(task)


TaskName = Annotated[str, Depends(_task_name)]


class Server:
    """A bank that answers over HTTP."""

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        self.served, self.settings, self.metrics = served, settings, Metrics()
        self.predictor = Predictor(served) if served.kind != "causal-lm" else None
        self.decoder = Decoder(served) if served.kind == "causal-lm" else None
        engine: Any = self.predictor or self.decoder
        self.batcher = Batcher(engine.run, settings, engine.call_tokens, self.metrics.batch)
        self._reader = ThreadPoolExecutor(1, "reader")  # reads tasks and makes tokens, beside the model
        self.metrics.watch("lotr_queue_rows", "Rows that wait.", lambda: len(self.batcher))
        cache = served.rows.cache
        self.metrics.watch("lotr_cache_hits", "Tasks that were in memory.", lambda: cache.hits)
        self.metrics.watch("lotr_cache_misses", "Tasks that were read.", lambda: cache.misses)
        self.metrics.watch("lotr_tasks", "Tasks of the bank.", lambda: len(served.bank))

    async def read(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run what may wait for the disk, or takes time, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, call, *args)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run batches while the application lives; the last ones are finished."""
        self.batcher.start()
        yield
        await self.batcher.close()
        self._reader.shutdown()

    async def _rows(
        self, request: Request, task: str, texts: Sequence[Any], encode: Callable[[], Any]
    ) -> list[Any]:
        """Return the texts of a request in tokens, unless they are too many."""
        most = self.settings.max_texts
        if not 0 < len(texts) <= most:
            raise Problem(422, f"Send 1 to {most} texts in a request, and not {len(texts)}.")
        request.state.log |= {"task": task, "rows": len(texts)}
        self.batcher.check_room(len(texts))
        return list(await self.read(encode))

    def _predictor(self) -> Predictor:
        if self.predictor is None:
            raise Problem(404, "This bank's base model is a language model. Use /v1/completions.")
        return self.predictor

    async def predict(self, task: TaskName, texts: Texts, request: Request) -> JSONResponse:
        """Label texts with a task."""
        predictor = self._predictor()
        if self.served.rows.head is None:
            raise Problem(404, "This bank's base model has no head for labels. Use /v1/embeddings.")
        firsts, seconds = texts.columns()
        encode = partial(predictor.encode, task, firsts, seconds, texts.truncate)
        rows = await self._rows(request, task, firsts, encode)
        predictions = await answers_of(self.batcher.submit(rows))
        kind = "regression" if "value" in predictions[0] else "classification"
        self.metrics.rows.labels(kind).inc(len(rows))
        return JSONResponse({"task": task, "predictions": predictions})

    async def embed(self, asked: Embed, request: Request) -> JSONResponse:
        """Turn texts into vectors with a task."""
        encode = partial(self._predictor().encode, asked.model, asked.input, embed=True)
        check_pooling(self.served.model.get_base_model())
        rows = await self._rows(request, asked.model, asked.input, encode)
        vectors = await answers_of(self.batcher.submit(rows))
        self.metrics.rows.labels("embedding").inc(len(rows))
        return JSONResponse(in_openai_form(asked, vectors, sum(row.length for row in rows)))

    async def complete(self, asked: Completion, request: Request) -> Any:
        return await self._write(asked, request)

    async def chat(self, asked: Chat, request: Request) -> Any:
        return await self._write(asked, request)

    async def _write(self, asked: Completion | Chat, request: Request) -> Any:
        if self.decoder is None:
            raise Problem(404, "This bank's base is no language model. Use /v1/tasks/TASK/predict.")
        texts, most = asked.prompts(), self.settings.max_tokens
        if (asked.max_tokens or 0) > most:
            raise Problem(422, f"max_tokens is at most {most} here.", "max_tokens")
        options = {"temperature": asked.temperature, "stop": asked.stop or (), "seed": asked.seed}
        encode = partial(self.decoder.encode, asked.model, texts, asked.max_tokens, most, **options)
        prompts = await self._rows(request, asked.model, texts, encode)
        writing = Writing(asked, prompts, self.batcher.submit, self._count)
        if not asked.stream:
            return JSONResponse(await writing.whole())
        events = writing.events()
        first = await anext(events)  # where this is an error, it still is the answer
        return StreamingResponse(_after(first, events), media_type="text/event-stream")

    def _count(self, answers: Sequence[Continuation]) -> None:
        self.metrics.rows.labels("causal-lm").inc(len(answers))
        self.metrics.tokens.inc(sum(answer.tokens for answer in answers))

    async def models(
        self, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> dict[str, Any]:
        """List tasks in the order of their names, in OpenAI's form, a page at a time."""
        rows = await asyncio.to_thread(self.served.bank.overview, after, limit + 1)
        data = [_as_model(row["name"], row["created"]) for row in rows[:limit]]
        return {"object": "list", "data": data, "has_more": len(rows) > limit}

    async def model(self, task: TaskName) -> dict[str, Any]:
        about = await asyncio.to_thread(self.served.bank.about, task)
        shown = {key: about[key] for key in ("labels", "metadata")}
        return _as_model(task, about["created"]) | {"kind": about["task"] or self.served.kind} | shown

    async def add(self, task: TaskName, request: Request, replace: bool = False) -> JSONResponse:
        """Add an exported task, sent as a zip file of its folder."""
        request.state.log["task"] = task
        upload, most = await request.body(), self.settings.max_upload
        error = await asyncio.to_thread(add_archive, self.served.bank, task, upload, replace, most)
        return JSONResponse({"task": task, "rounding_error": error}, 201)

    async def remove(self, task: TaskName, request: Request) -> dict[str, Any]:
        def remove() -> None:
            with CoreBank.open(self.served.bank.path, writable=True) as bank:
                bank.remove(task)

        request.state.log["task"] = task
        await asyncio.to_thread(remove)
        return {"task": task, "deleted": True}

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Tell whether another request would be taken."""
        ready = self.batcher.accepts
        return JSONResponse({"status": "ok" if ready else "busy"}, 200 if ready else 503)

    async def prometheus(self) -> Response:
        content = generate_latest(self.metrics.registry)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self) -> FileResponse:
        """Show the page on which tasks are tried by hand; it loads nothing from elsewhere."""
        place = Path(__file__).with_name("page.html")
        return FileResponse(place, headers={"Content-Security-Policy": _POLICY})


def create_app(served: Served, settings: ServeSettings | None = None) -> Gate:
    """Return the application that serves a bank on its base model."""
    settings = settings or ServeSettings()
    server = Server(served, settings)
    app = FastAPI(title="lotr", lifespan=server.lifespan, docs_url=None, redoc_url=None)
    routes: list[tuple[str, str, Any]] = [
        ("GET", "/", server.page),
        ("GET", "/healthz", server.health),
        ("GET", "/readyz", server.ready),
        ("GET", "/metrics", server.prometheus),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{task}", server.model),
        ("POST", "/v1/tasks/{task}", server.add),
        ("DELETE", "/v1/tasks/{task}", server.remove),
        ("POST", "/v1/tasks/{task}/predict", server.predict),
        ("POST", "/v1/embeddings", server.embed),
        ("POST", "/v1/completions", server.complete),
        ("POST", "/v1/chat/completions", server.chat),
    ]
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    for kind in (Exception, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, partial(_answer, served.bank.path))
    return Gate(app, settings, server.metrics, served.bank.path)


def _as_model(name: str, created: str) -> dict[str, Any]:
    at = int(datetime.fromisoformat(created).timestamp()) if created else 0
    return {"id": name, "object": "model", "created": at, "owned_by": "lotr"}


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


async def _answer(bank: Path, request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "json_invalid":
            message = f"The body is no JSON: {first['ctx']['error']}, at character {field}."
            return Problem(400, message).response()
        if not field:  # the whole body is meant, which was read as JSON only where it says that it is
            sent = request.headers.get("content-type", "").startswith("application/json")
            message = "Send a JSON object as the body, with the header Content-Type: application/json."
            return Problem(422 if sent else 415, message).response()
        return Problem(422, f"{field}: {first['msg']}.", field).response()
    if isinstance(error, HTTPException):
        return Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()
    return problem_of(error, bank).response()
