"""Encoders over HTTP: answers, and every way to ask wrongly."""

from __future__ import annotations

import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch

pytest.importorskip("fastapi")

from lotr import CoreBank
from lotr.errors import ConfigError
from lotr.serving.settings import ServeSettings
from lotr.training.tasks.served import Served, load_served
from served_banks import encoder_bank, encoder_task
from servers import Client, serving

TEXTS = ["the red thing", "old old old is blue and very green here", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of five tasks, a regression, a task of pairs, and one with an odd name."""
    folder = tmp_path_factory.mktemp("serve")
    with encoder_bank(folder, tasks=5) as bank:
        bank.add(encoder_task(bank, "number", 7, labels=()))
        bank.add(encoder_task(bank, "pairs", 8, pairs=True, max_length=32))
        bank.add(encoder_task(bank, "../x/predict?'; DROP TABLE task", 9))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Any:
    with serving(folder) as client:
        yield client


def alone(served: Served, task: str, *texts: str) -> list[float]:
    """The logits of one row that runs by itself."""
    batch = served.tokenizer(*texts, return_tensors="pt")
    with torch.no_grad():
        return served.model(**batch, task_ids=[task]).logits[0].tolist()


def test_answers_are_those_of_the_row_alone(folder: Path, client: Client) -> None:
    served = load_served(folder / "bank")
    for task in ("task-0", "task-3"):
        for text in TEXTS:
            answer = client.predict(task, text)
            scores = torch.softmax(torch.tensor(alone(served, task, text)), -1)
            assert answer["label"] == "abc"[int(scores.argmax())]
            torch.testing.assert_close(
                torch.tensor(list(answer["scores"].values())), scores, atol=1e-5, rtol=0
            )
    value = client.predict("number", TEXTS[0])["value"]
    assert value == pytest.approx(alone(served, "number", TEXTS[0])[0], abs=1e-5)
    body = {"texts": TEXTS, "texts2": TEXTS[::-1]}
    _, answer, _ = client.send("POST", "/v1/tasks/pairs/predict", body)
    for one, text, text2 in zip(answer["predictions"], *body.values(), strict=True):
        scores = torch.softmax(torch.tensor(alone(served, "pairs", text, text2)), -1)
        torch.testing.assert_close(torch.tensor(list(one["scores"].values())), scores, atol=1e-5, rtol=0)


def test_a_name_is_data_and_never_a_path(client: Client) -> None:
    name = "../x/predict?'; DROP TABLE task"
    status, answer, _ = client.send("POST", f"/v1/tasks/{quote(name, safe='')}/predict", {"text": "a"})
    assert (status, answer["task"]) == (200, name)
    _, models, _ = client.send("GET", "/v1/models?limit=3")
    assert models["data"][0]["id"] == name and models["has_more"]
    _, rest, _ = client.send("GET", f"/v1/models?after={quote(models['data'][-1]['id'])}")
    assert len(models["data"]) + len(rest["data"]) == 8 and not rest["has_more"]
    _, one, _ = client.send("GET", "/v1/models/task-1")
    assert (one["object"], one["kind"], one["labels"]) == ("model", "classification", ["a", "b", "c"])


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("tasks/task-7/predict", {"text": "a"}, 404, "no task 'task-7'"),
        ("tasks/task-1/predict", b'{"text": "a', 400, "no JSON"),
        ("tasks/task-1/predict", b"\xff\xfe{}", 400, "no JSON"),
        ("tasks/task-1/predict", {"text": "\ud800"}, 422, "text"),
        ("tasks/task-1/predict", ["a"], 422, "Send a JSON object"),
        ("tasks/task-1/predict", {"text": 3}, 422, "text: "),
        ("tasks/task-1/predict", {"txt": "a"}, 422, "txt: "),
        ("tasks/task-1/predict", {}, 422, "Send one of"),
        ("tasks/task-1/predict", {"text": "a", "texts": ["a"]}, 422, "Send one of"),
        ("tasks/task-1/predict", {"texts": ["a"] * 65}, 422, "Send 1 to 64 texts"),
        ("tasks/task-1/predict", {"text": "a " * 100}, 422, "has 100 tokens, and task 'task-1' takes 64"),
        ("tasks/task-1/predict", {"text": "a" * (2 << 20)}, 413, "longer than"),
        ("tasks/pairs/predict", {"text": "a"}, 422, "takes pairs"),
        ("tasks/pairs/predict", {"texts": ["a", "b"], "texts2": ["a"]}, 422, "no pairs"),
        ("nothing", {}, 404, "Not Found"),
        ("models", {}, 405, "Method Not Allowed"),
        ("tasks/new", b"", 403, "--admin-token"),
    ],
)
def test_a_wrong_request_gets_one_clear_error(
    client: Client, folder: Path, path: str, body: Any, status: int, message: str
) -> None:
    answered, answer, _ = client.send("POST", f"/v1/{path}", body)
    assert (answered, answer["error"].keys()) == (status, {"message", "type", "param", "code"})
    assert message in answer["error"]["message"]
    assert str(folder) not in answer["error"]["message"]


def test_a_body_that_does_not_say_it_is_json_is_told_so(client: Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl -d sends it
    status, answer, _ = client.send("POST", "/v1/tasks/task-1/predict", {"text": "a"}, **form)
    assert status == 415 and "Content-Type: application/json" in answer["error"]["message"]


def test_a_long_text_is_cut_when_asked(folder: Path, client: Client) -> None:
    body = {"text": "the red " * 50, "truncate": True}
    status, answer, _ = client.send("POST", "/v1/tasks/task-1/predict", body)
    assert status == 200
    cut = alone(load_served(folder / "bank"), "task-1", "the red " * 32)
    assert list(answer["predictions"][0]["scores"].values()) == pytest.approx(
        torch.softmax(torch.tensor(cut), -1).tolist(), abs=1e-5
    )


def test_a_damaged_task_fails_alone(tmp_path: Path) -> None:
    with encoder_bank(tmp_path, tasks=3) as bank, bank.store.database.connected() as connection:
        connection.execute("UPDATE task SET numbers = zeroblob(12) WHERE name = 'task-1'")
    with serving(tmp_path, max_wait=100) as client, ThreadPoolExecutor(3) as pool:
        names = ["task-0", "task-1", "task-2"]
        answers = list(
            pool.map(lambda name: client.send("POST", f"/v1/tasks/{name}/predict", {"text": "a"}), names)
        )
        assert [status for status, *_ in answers] == [200, 500, 200]
        assert "Task 'task-1'" in answers[1][1]["error"]["message"]
        assert str(tmp_path) not in answers[1][1]["error"]["message"]  # where it is concerns nobody outside


def test_tokens_keep_others_out(folder: Path) -> None:
    with serving(folder, token="secret", admin_token="more") as client:
        assert client.send("GET", "/v1/models")[0] == 200
        assert client.send("DELETE", "/v1/tasks/task-0")[0] == 401
        stranger = Client(client.port, "guess")
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/tasks/a/predict"), ("GET", "/metrics")):
            status, answer, headers = stranger.send(method, path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz"):
            assert stranger.send("GET", path)[0] == 200


def archive(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for path in folder.iterdir():
            file.write(path, f"../../{path.name}")
    return content.getvalue()


def test_tasks_come_and_go_while_others_are_served(tmp_path: Path) -> None:
    with encoder_bank(tmp_path, tasks=1) as bank:
        bank.add(encoder_task(bank, "task-1", 1, columns={}, max_length=64))
        bank.export("task-1", tmp_path / "exported")
    zipped = archive(tmp_path / "exported")
    as_zip = {"Content-Type": "application/zip"}
    with serving(tmp_path, admin_token="more") as client:
        admin = Client(client.port, "more")
        first = client.predict("task-1", TEXTS[1])
        assert admin.send("POST", "/v1/tasks/..%2Fnew", zipped, **as_zip)[0] == 201
        assert client.predict("..%2Fnew", TEXTS[1])["scores"] == pytest.approx(first["scores"])
        status, answer, _ = admin.send("POST", "/v1/tasks/task-0", zipped, **as_zip)
        assert (status, "already" in answer["error"]["message"]) == (409, True)
        assert client.predict("task-0", TEXTS[1]) != first
        assert admin.send("POST", "/v1/tasks/task-0?replace=true", zipped, **as_zip)[0] == 201
        assert client.predict("task-0", TEXTS[1])["scores"] == pytest.approx(first["scores"])
        assert admin.send("DELETE", "/v1/tasks/task-0")[0] == 200
        assert client.send("POST", "/v1/tasks/task-0/predict", {"text": "a"})[0] == 404
        assert admin.send("DELETE", "/v1/tasks/task-0")[0] == 404
        assert admin.send("POST", "/v1/tasks/bad", b"PK garbage", **as_zip)[0] == 400
        assert admin.send("POST", "/v1/tasks/bad", zipped[:-40], **as_zip)[0] == 400
        weights = tmp_path / "exported" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        status, answer, _ = admin.send("POST", "/v1/tasks/cut", archive(tmp_path / "exported"), **as_zip)
        assert status == 400 and answer["error"]["message"].startswith(
            "cut/adapter_model.safetensors is truncated"
        )
        with CoreBank.open(tmp_path / "bank", writable=True) as other:  # as another process does
            other.add(encoder_task(other, "later", 5, labels=("x", "y")))
            assert set(client.predict("later", "a")["scores"]) == {"x", "y"}
            other.add(encoder_task(other, "later", 6, labels=("x", "y", "z")), replace=True)
            assert set(client.predict("later", "a")["scores"]) == {"x", "y", "z"}


def test_a_task_that_is_removed_while_tasks_are_listed_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CoreBank.open(folder / "bank") as bank:
        monkeypatch.setattr(bank.store, "names", lambda after, limit: ["task-0", "task-05", "task-1"])
        assert [row["name"] for row in bank.overview()] == ["task-0", "task-1"]


class Slow:
    """A bank whose batches take a while."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.served = load_served(folder / "bank")
        self.sizes: list[int] = []
        forward = self.served.model.forward

        def slow(**inputs: Any) -> Any:
            self.sizes.append(len(inputs["input_ids"]))
            time.sleep(seconds)
            return forward(**inputs)

        self.served.model.forward = slow  # type: ignore[method-assign]


def test_rows_of_many_tasks_share_a_batch(folder: Path) -> None:
    slow = Slow(folder, 0.2)
    with serving(folder, slow.served, max_batch=8, max_wait=20) as client, ThreadPoolExecutor(17) as pool:
        list(pool.map(lambda n: client.predict(f"task-{n % 5}", TEXTS[n % 3]), range(17)))
        text = client.send("GET", "/metrics")[1]
    assert max(slow.sizes) <= 8 and sum(slow.sizes) == 17 and len(slow.sizes) <= 5
    assert 'lotr_rows_total{kind="classification"} 17.0' in text
    assert 'lotr_requests_total{route="/v1/tasks/{task}/predict",status="200"} 17.0' in text


def test_a_full_queue_says_when_to_come_back_and_touches_nobody(folder: Path) -> None:
    slow = Slow(folder, 0.3)
    with serving(folder, slow.served, max_batch=2, max_queue=4, max_texts=4) as client:
        with ThreadPoolExecutor(12) as pool:
            body = {"text": "a"}
            answers = list(
                pool.map(lambda n: client.send("POST", f"/v1/tasks/task-{n % 5}/predict", body), range(12))
            )
        refused = [(answer, headers) for status, answer, headers in answers if status == 429]
        assert 4 <= len(refused) <= 8
        assert all(int(headers["Retry-After"]) >= 1 for _, headers in refused)
        assert all(status == 200 for status, *_ in answers if status != 429)
        assert client.send("GET", "/readyz")[0] == 200


def test_the_deadline_ends_a_request_and_its_row(folder: Path) -> None:
    slow = Slow(folder, 0.5)
    with serving(folder, slow.served, max_batch=1, timeout=0.7) as client, ThreadPoolExecutor(4) as pool:
        statuses = pool.map(
            lambda n: client.send("POST", "/v1/tasks/task-1/predict", {"text": "a"})[0], range(4)
        )
        assert sorted(statuses) == [200, 504, 504, 504]
    assert len(slow.sizes) == 2  # the two that had not begun never ran


def test_clients_that_leave_dawdle_or_send_garbage_hurt_nobody(folder: Path) -> None:
    slow = Slow(folder, 0.2)
    with serving(folder, slow.served, max_batch=1, timeout=2) as client:
        body = b'{"text": "a"}'
        head = b"POST /v1/tasks/task-1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for content in (
            b"\x16\x03\x01 garbage\r\n\r\n",
            head + b"Content-Length: 1000\r\n\r\n" + body[:5],
            head + b"Content-Length: -5\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", client.port)) as stranger:
                stranger.sendall(content)
        sockets = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(6)]
        for one in sockets:
            one.sendall(head + b"Content-Length: 13\r\n\r\n" + body)
        time.sleep(0.1)
        for one in sockets:
            one.close()  # with the first row in the model and five in the queue
        dawdling = socket.create_connection(("127.0.0.1", client.port))
        dawdling.sendall(head + b"Content-Length: 13\r\n\r\n" + body[:5])
        began = time.monotonic()
        assert client.predict("task-2", "a")["label"] in "abc"
        assert time.monotonic() - began < 1
        assert len(slow.sizes) <= 3
        assert b"504" in dawdling.recv(100)
        dawdling.close()
        assert 'status="499"} 6.0' in client.send("GET", "/metrics")[1]


def test_sigterm_finishes_what_has_begun(folder: Path) -> None:
    words = ["serve", str(folder / "bank"), "--port", "0", "--max-wait", "700"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lotr", *words], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if '"listening"' in line)
    client = Client(int(line.split("127.0.0.1:")[1].split('"')[0]))
    assert client.send("GET", "/readyz")[0] == 200
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(client.predict("task-1", "a")))
    asking.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0]["label"] in "abc"
    assert process.wait(20) == 0
    log = process.stderr.read()
    process.stderr.close()
    assert '"event": "request"' in log and '"task": "task-1"' in log and '"ended"' in log


def test_settings_that_could_serve_nobody_are_refused() -> None:
    for wrong in ({"max_batch": 0}, {"max_wait": -1.0}, {"timeout": 0.0}, {"max_queue": 3}):
        with pytest.raises(ConfigError):
            ServeSettings(**wrong)  # type: ignore[arg-type]


TASKS, CLIENTS = 50, 32
REQUESTS = int(os.environ.get("LOTR_SERVE_REQUESTS", "320"))  # the long form: 2000, or hours
WRITING = 0.5  # seconds that one write takes at most


def test_every_answer_is_that_of_the_task_at_that_time(tmp_path: Path) -> None:
    """Tasks are added, replaced and removed under load; labels tell which version answered."""
    versions = 4
    with encoder_bank(tmp_path) as bank, encoder_bank(tmp_path / "all") as every:

        def version(of: CoreBank, name: str, task: int, n: int) -> Any:
            labels = tuple(f"{task}.{n}.{c}" for c in range(2 + (task + n) % 3))
            return encoder_task(of, name, 10 * task + n, labels)

        every.add_many(version(every, f"{t}@{n}", t, n) for t in range(TASKS) for n in range(versions))
        bank.add_many(version(bank, str(t), t, 0) for t in range(0, TASKS, 2))
        served = load_served(every)
        catalog_of = every.about
        expected: dict[tuple[str, str], dict[str, float]] = {}

        def truth(task: str, n: str, text: str) -> dict[str, float]:
            key = (f"{task}@{n}", text)
            if key not in expected:
                logits = torch.tensor(alone(served, *key))
                labels = catalog_of(key[0])["labels"]
                expected[key] = dict(zip(labels, torch.softmax(logits, -1).tolist(), strict=True))
            return expected[key]

        done = threading.Event()
        # what each task was, from before it was written to after it was written again
        history: dict[int, list[tuple[float, int | None]]] = {t: [(0.0, 0)] for t in range(0, TASKS, 2)}

        def write() -> None:
            for n in itertools.count():
                if done.wait(0.003):
                    return
                task, number = (7 * n) % TASKS, n // 9 % versions
                began = time.monotonic()
                if n % 5 == 4 and str(task) in bank:
                    bank.remove(str(task))
                    history[task].append((began, None))
                else:
                    bank.add(version(bank, str(task), task, number), replace=True)
                    history.setdefault(task, []).append((began, number))

        def was(task: int, number: int, asked: float, answered: float) -> bool:
            states = [*history[task], (time.monotonic(), None)]
            return any(
                state == number and began <= answered and ended + WRITING >= asked
                for (began, state), (ended, _) in itertools.pairwise(states)
            )

        answers: list[tuple[int, str, Any, float, float]] = []

        def ask(client: Client, n: int) -> None:
            task, text = (13 * n) % TASKS, TEXTS[n % 3]
            asked = time.monotonic()
            status, answer, _ = client.send("POST", f"/v1/tasks/{task}/predict", {"text": text})
            answers.append((status, text, answer, asked, time.monotonic()))

        with serving(tmp_path) as client:
            writer = threading.Thread(target=write)
            writer.start()
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(lambda n: ask(client, n), range(REQUESTS)))
            done.set()
            writer.join()
        assert {status for status, *_ in answers} <= {200, 404}
        right = [own for status, *own in answers if status == 200]
        assert len(right) > REQUESTS / 2
        for text, answer, asked, answered in right:
            one = answer["predictions"][0]
            task, n, _ = one["label"].split(".")
            assert task == answer["task"] and was(int(task), int(n), asked, answered)
            assert one["scores"] == pytest.approx(truth(task, n, text), abs=1e-5)
            assert one["label"] == max(one["scores"], key=one["scores"].__getitem__)
        assert len({answer["predictions"][0]["label"].split(".")[1] for _, answer, *_ in right}) > 1
