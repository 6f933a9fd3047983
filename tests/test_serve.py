"""Encoders over HTTP: answers, and every way to ask wrongly."""

from __future__ import annotations

import base64
import io
import itertools
import json
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
import transformers as tf

pytest.importorskip("fastapi")

import banks
from banks import bare_encoder_bank, decoder_bank, encoder_bank
from lotr import CoreBank, Task
from lotr.errors import ConfigError
from lotr.serving.settings import ServeSettings
from lotr.training.tasks.served import Served, load_served
from lotr_cli.app import app
from servers import ZIP, Client, Counted, archive, serving, until

TEXTS = ["the red thing", "old old old is blue and very green here", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of five tasks, a regression, a task of pairs, and one with an odd name."""
    folder = tmp_path_factory.mktemp("serve")
    with encoder_bank(folder, tasks=5) as bank:
        bank.add(banks.task(bank, "number", 7, labels=()))
        bank.add(banks.task(bank, "pairs", 8, pairs=True, max_length=32))
        bank.add(banks.task(bank, "../x/predict?'; DROP TABLE task", 9))
    return folder


@pytest.fixture(scope="module")
def clients(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """Servers of an encoder, of one without a head, of one that pools otherwise, and of a language model."""
    others = tmp_path_factory.mktemp("others")
    bare_encoder_bank(others / "bare", tasks=1).close()
    decoder_bank(others / "decoder", tasks=2).close()
    encoder_bank(others / "pooling", tasks=1).close()
    (others / "pooling" / "model" / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (others / "pooling" / "model" / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    with ExitStack() as stack:
        made = {name: serving(others / name, max_tokens=32) for name in ("bare", "decoder", "pooling")}
        yield {name: stack.enter_context(own) for name, own in {"encoder": serving(folder), **made}.items()}


@pytest.fixture
def client(clients: dict[str, Client]) -> Client:
    return clients["encoder"]


def alone(served: Served, task: str, *texts: str) -> torch.Tensor:
    """The logits of one row that runs by itself."""
    batch = served.tokenizer(*texts, return_tensors="pt")
    with torch.no_grad():
        return served.model(**batch, task_ids=[task]).logits[0]


def assert_scores(answer: dict[str, Any], logits: torch.Tensor) -> None:
    """Check the probability of every label, and which is named."""
    expected = torch.softmax(logits, -1).tolist()
    assert list(answer["scores"].values()) == pytest.approx(expected, abs=1e-5)
    assert answer["label"] == max(answer["scores"], key=answer["scores"].__getitem__)


def test_answers_are_those_of_the_row_alone(folder: Path, client: Client) -> None:
    served = load_served(folder / "bank")
    for task in ("task-0", "task-3"):
        for text in TEXTS:
            assert_scores(client.predict(task, text), alone(served, task, text))
    value = client.predict("number", TEXTS[0])["value"]
    assert value == pytest.approx(float(alone(served, "number", TEXTS[0])[0]), abs=1e-5)
    body = {"texts": TEXTS, "texts2": TEXTS[::-1]}
    _, answer, _ = client.send("POST", "/v1/tasks/pairs/predict", body)
    for one, text, text2 in zip(answer["predictions"], *body.values(), strict=True):
        assert_scores(one, alone(served, "pairs", text, text2))
    body = {"text": "the red " * 50, "truncate": True}
    _, answer, _ = client.send("POST", "/v1/tasks/task-1/predict", body)
    assert_scores(answer["predictions"][0], alone(served, "task-1", "the red " * 32))


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


PREDICT, EMBED, COMPLETE = "tasks/task-1/predict", "embeddings", "completions"
EMBEDDED, COMPLETED = {"model": "task-0", "input": "a"}, {"model": "task-1", "prompt": "a"}


@pytest.mark.parametrize(
    ("kind", "path", "body", "status", "message"),
    [
        ("encoder", "tasks/task-7/predict", {"text": "a"}, 404, "no task 'task-7'"),
        ("encoder", PREDICT, b'{"text": "a', 400, "no JSON"),
        ("encoder", PREDICT, b"\xff\xfe{}", 400, "no JSON"),
        ("encoder", PREDICT, {"text": "\ud800"}, 422, "text"),
        ("encoder", PREDICT, ["a"], 422, "Send a JSON object"),
        ("encoder", PREDICT, {"text": 3}, 422, "text: "),
        ("encoder", PREDICT, {"txt": "a"}, 422, "txt: "),
        ("encoder", PREDICT, {}, 422, "Send one of"),
        ("encoder", PREDICT, {"text": "a", "texts": ["a"]}, 422, "Send one of"),
        ("encoder", PREDICT, {"texts": ["a"] * 65}, 422, "Send 1 to 64 texts"),
        ("encoder", PREDICT, {"text": "a " * 100}, 422, "has 100 tokens, and task 'task-1' takes 64"),
        ("encoder", PREDICT, {"text": "a" * (2 << 20)}, 413, "longer than"),
        ("encoder", "tasks/pairs/predict", {"text": "a"}, 422, "takes pairs"),
        ("encoder", "tasks/pairs/predict", {"texts": ["a", "b"], "texts2": ["a"]}, 422, "no pairs"),
        ("encoder", "nothing", {}, 404, "Not Found"),
        ("encoder", "models", {}, 405, "Method Not Allowed"),
        ("encoder", "tasks/new", b"", 403, "--admin-token"),
        ("encoder", EMBED, EMBEDDED | {"input": []}, 422, "Send 1 to 64 texts"),
        ("encoder", EMBED, EMBEDDED | {"input": [3, 4]}, 422, "input.0"),
        ("encoder", EMBED, EMBEDDED | {"input": ["a"] * 65}, 422, "Send 1 to 64 texts"),
        ("encoder", EMBED, EMBEDDED | {"input": "a " * 100}, 422, "has 100 tokens"),
        ("encoder", EMBED, EMBEDDED | {"encoding_format": "hex"}, 422, "encoding_format"),
        ("encoder", EMBED, EMBEDDED | {"dimensions": 3}, 422, "dimensions"),
        ("encoder", EMBED, EMBEDDED | {"model": "__base__"}, 404, "without a task"),
        ("pooling", EMBED, EMBEDDED, 404, "pools by cls"),
        ("bare", "tasks/task-0/predict", {"text": "a"}, 404, "no head for labels. Use /v1/embeddings"),
        ("encoder", COMPLETE, COMPLETED, 404, "no language model. Use /v1/tasks"),
        ("decoder", EMBED, EMBEDDED, 404, "/v1/completions"),
        ("decoder", PREDICT, {"text": "a"}, 404, "/v1/completions"),
        ("decoder", COMPLETE, COMPLETED | {"model": "task-9"}, 404, "no task 'task-9'"),
        ("decoder", COMPLETE, COMPLETED | {"model": "gone", "stream": True}, 404, "no task 'gone'"),
        ("decoder", COMPLETE, COMPLETED | {"prompt": []}, 422, "Send 1 to 64 texts"),
        ("decoder", COMPLETE, COMPLETED | {"prompt": [3, 4]}, 422, "prompt.0: "),
        ("decoder", COMPLETE, COMPLETED | {"max_tokens": 33}, 422, "at most 32"),
        ("decoder", COMPLETE, COMPLETED | {"prompt": "a " * 50, "max_tokens": 20}, 422, "takes 64 tokens"),
        ("decoder", COMPLETE, COMPLETED | {"prompt": "a " * 70}, 422, "takes 64 tokens in all"),
        ("decoder", COMPLETE, COMPLETED | {"temperature": -1}, 422, "temperature"),
        ("decoder", COMPLETE, COMPLETED | {"stop": ["a"] * 5}, 422, "stop"),
        ("decoder", COMPLETE, COMPLETED | {"stop": ["a", ""]}, 422, "stop.1: "),
        ("decoder", COMPLETE, COMPLETED | {"prompt": "\ud83d"}, 422, "prompt.0"),
        ("decoder", COMPLETE, COMPLETED | {"frequency_penalty": 0.5}, 422, "frequency_penalty"),
        ("decoder", COMPLETE, COMPLETED | {"logit_bias": {"5": 1}}, 422, "logit_bias"),
        ("decoder", COMPLETE, COMPLETED | {"stream": True, "n": 2}, 422, "n: "),
    ],
)
def test_a_wrong_request_gets_one_clear_error(
    clients: dict[str, Client], folder: Path, kind: str, path: str, body: Any, status: int, message: str
) -> None:
    answered, answer, _ = clients[kind].send("POST", f"/v1/{path}", body)
    assert (answered, answer["error"].keys()) == (status, {"message", "type", "param", "code"})
    assert message in answer["error"]["message"]
    assert str(folder) not in answer["error"]["message"]


def test_a_body_that_does_not_say_it_is_json_is_told_so(client: Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl -d sends it
    status, answer, _ = client.send("POST", "/v1/tasks/task-1/predict", {"text": "a"}, **form)
    assert status == 415 and "Content-Type: application/json" in answer["error"]["message"]


def vector_alone(bank: CoreBank, name: str, text: str, bare: bool) -> torch.Tensor:
    """The mean over the tokens of one text that runs by itself, of length 1."""
    kind = tf.AutoModel if bare else tf.AutoModelForSequenceClassification
    model = bank.wrap(kind.from_pretrained(bank.base_model))
    inputs = tf.AutoTokenizer.from_pretrained(bank.base_model)(text, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, task_ids=[name], output_hidden_states=True)
    mean = output.hidden_states[-1][0].mean(0)
    return mean / mean.norm()


def embed(client: Client, task: str, texts: Any, **more: Any) -> tuple[int, Any]:
    return client.send("POST", "/v1/embeddings", {"model": task, "input": texts, **more})[:2]


@pytest.mark.parametrize("bare", [False, True])
def test_vectors_are_those_of_the_row_alone(tmp_path: Path, bare: bool) -> None:
    with (bare_encoder_bank if bare else encoder_bank)(tmp_path, tasks=3) as bank:
        if not bare:  # tasks of pairs and tasks without a head embed, too
            bank.add(Task("headless", bank.get("task-1").numbers))
            bank.add(banks.task(bank, "pairs", 8, pairs=True))
        names = [row["name"] for row in bank.overview()]
        with serving(tmp_path, max_wait=50) as client, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda name: embed(client, name, TEXTS), names))
            for name, (status, answer) in zip(names, answers, strict=True):
                assert status == 200 and answer["model"] == name
                assert [one["index"] for one in answer["data"]] == [0, 1, 2]
                for text, one in zip(TEXTS, answer["data"], strict=True):
                    torch.testing.assert_close(
                        torch.tensor(one["embedding"]),
                        vector_alone(bank, name, text, bare),
                        atol=1e-5,
                        rtol=0,
                    )
            first, second = (answer["data"][0]["embedding"] for _, answer in answers[-2:])
            assert (torch.tensor(first) - torch.tensor(second)).norm() > 1e-2
            assert answers[0][1]["usage"] == {"prompt_tokens": 13, "total_tokens": 13}


def test_labels_and_vectors_share_a_server(folder: Path) -> None:
    with serving(folder, max_wait=100) as client, ThreadPoolExecutor(8) as pool:
        label, vector = client.predict("task-1", TEXTS[0]), embed(client, "task-1", TEXTS[0])[1]
        labels = pool.map(lambda _: client.predict("task-1", TEXTS[0]), range(4))
        vectors = pool.map(lambda _: embed(client, "task-1", TEXTS[0])[1], range(4))
        assert all(one["scores"] == pytest.approx(label["scores"], abs=1e-5) for one in labels)
        expected = pytest.approx(vector["data"][0]["embedding"], abs=1e-5)
        assert all(one["data"][0]["embedding"] == expected for one in vectors)


def test_base64_is_the_same_numbers(client: Client) -> None:
    vector, packed = (
        embed(client, "task-0", TEXTS[0], encoding_format=form)[1]["data"][0]["embedding"]
        for form in ("float", "base64")
    )
    assert list(struct.unpack("<32f", base64.b64decode(packed))) == pytest.approx(vector, abs=1e-7)


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
        for method in ("DELETE", "POST"):
            for task in ("task-0", "predict", "..%2Fpredict"):  # whatever a task is called
                assert client.send(method, f"/v1/tasks/{task}")[0] == 401
        stranger = Client(client.port, "guess")
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/tasks/a/predict"), ("GET", "/metrics")):
            status, answer, headers = stranger.send(method, path)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/readyz"):
            assert stranger.send("GET", path)[0] == 200


def damaged(folder: Path) -> Iterator[bytes]:
    """Archives whose members were packed, and then hurt."""
    for way in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        content = bytearray(archive(folder, way))
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            begins = file.infolist()[0].header_offset
        content[begins + 70 : begins + 90] = bytes(20)
        yield bytes(content)


def test_tasks_come_and_go_while_others_are_served(tmp_path: Path) -> None:
    with encoder_bank(tmp_path, tasks=1) as bank:
        bank.add(banks.task(bank, "task-1", 1, columns={}, max_length=64))
        bank.export("task-1", tmp_path / "exported")
    zipped = archive(tmp_path / "exported")
    with serving(tmp_path, admin_token="more") as client:
        admin = Client(client.port, "more")
        first = client.predict("task-1", TEXTS[1])
        assert admin.send("POST", "/v1/tasks/..%2Fnew", zipped, **ZIP)[0] == 201
        assert client.predict("..%2Fnew", TEXTS[1])["scores"] == pytest.approx(first["scores"])
        status, answer, _ = admin.send("POST", "/v1/tasks/task-0", zipped, **ZIP)
        assert (status, "already" in answer["error"]["message"]) == (409, True)
        assert client.predict("task-0", TEXTS[1]) != first
        assert admin.send("POST", "/v1/tasks/task-0?replace=true", zipped, **ZIP)[0] == 201
        assert client.predict("task-0", TEXTS[1])["scores"] == pytest.approx(first["scores"])
        assert admin.send("DELETE", "/v1/tasks/task-0")[0] == 200
        assert client.send("POST", "/v1/tasks/task-0/predict", {"text": "a"})[0] == 404
        assert admin.send("DELETE", "/v1/tasks/task-0")[0] == 404
        assert admin.send("POST", "/v1/tasks/bad", b"PK garbage", **ZIP)[0] == 400
        for broken in (zipped[:-40], *damaged(tmp_path / "exported")):
            assert admin.send("POST", "/v1/tasks/bad", broken, **ZIP)[0] == 400
        weights = tmp_path / "exported" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:200])
        status, answer, _ = admin.send("POST", "/v1/tasks/cut", archive(tmp_path / "exported"), **ZIP)
        assert status == 400 and answer["error"]["message"].startswith(
            "cut/adapter_model.safetensors is truncated"
        )
        with CoreBank.open(tmp_path / "bank", writable=True) as other:  # as another process does
            other.add(banks.task(other, "later", 5, labels=("x", "y")))
            assert set(client.predict("later", "a")["scores"]) == {"x", "y"}
            other.add(banks.task(other, "later", 6, labels=("x", "y", "z")), replace=True)
            assert set(client.predict("later", "a")["scores"]) == {"x", "y", "z"}


def test_a_task_that_is_removed_while_tasks_are_listed_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CoreBank.open(folder / "bank") as bank:
        monkeypatch.setattr(bank.store, "names", lambda after, limit: ["task-0", "task-05", "task-1"])
        assert [row["name"] for row in bank.overview()] == ["task-0", "task-1"]


ROUTE = "/v1/tasks/{task}/predict"


@pytest.fixture
def held(folder: Path) -> Counted:
    """A model that waits to be let go."""
    model = Counted(load_served(folder / "bank"))
    model.go_on.clear()
    return model


def test_rows_of_many_tasks_share_a_batch(held: Counted) -> None:
    with serving(Path(), held.served, max_batch=8) as client, ThreadPoolExecutor(17) as pool:
        answers = pool.map(lambda n: client.predict(f"task-{n % 5}", TEXTS[n % 3]), range(17))
        until(lambda: sum(held.rows) + client.metric("lotr_queue_rows") == 17)
        held.go_on.set()
        list(answers)
        text = client.send("GET", "/metrics")[1]
    assert max(held.rows) <= 8 and sum(held.rows) == 17 and len(held.rows) <= 5
    assert 'lotr_rows_total{kind="classification"} 17.0' in text
    assert 'lotr_requests_total{route="/v1/tasks/{task}/predict",status="200"} 17.0' in text


def test_a_full_queue_says_when_to_come_back_and_touches_nobody(held: Counted) -> None:
    with serving(Path(), held.served, max_batch=2, max_queue=4, max_texts=4) as client:
        with ThreadPoolExecutor(12) as pool:
            body, full = {"text": "a"}, f'lotr_requests_total{{route="{ROUTE}",status="429"}}'
            asking = pool.map(
                lambda n: client.send("POST", f"/v1/tasks/task-{n % 5}/predict", body), range(12)
            )
            until(lambda: client.metric(full) >= 6)  # two at most are in the model, and four wait
            held.go_on.set()
            answers = list(asking)
        refused = [(answer, headers) for status, answer, headers in answers if status == 429]
        assert 6 <= len(refused) <= 8
        assert all(int(headers["Retry-After"]) >= 1 for _, headers in refused)
        assert all(status == 200 for status, *_ in answers if status != 429)
        assert client.send("GET", "/readyz")[0] == 200


def test_the_deadline_ends_a_request_and_its_row(held: Counted) -> None:
    with serving(Path(), held.served, max_batch=1, timeout=2) as client, ThreadPoolExecutor(4) as pool:
        path, body = "/v1/tasks/task-1/predict", {"text": "a"}
        assert [*pool.map(lambda _: client.send("POST", path, body)[0], range(4))] == [504] * 4
        held.go_on.set()
        assert client.send("POST", path, body)[0] == 200
    assert len(held.rows) == 2  # the three that had not begun never ran


def test_clients_that_leave_dawdle_or_send_garbage_hurt_nobody(held: Counted) -> None:
    with serving(Path(), held.served, max_batch=1, timeout=3) as client:
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
        until(lambda: len(held.rows) == 1 and client.metric("lotr_queue_rows") == 5)
        for one in sockets:
            one.close()
        until(lambda: client.metric(f'lotr_requests_total{{route="{ROUTE}",status="499"}}') == 6)
        held.go_on.set()
        dawdling = socket.create_connection(("127.0.0.1", client.port))
        dawdling.sendall(head + b"Content-Length: 13\r\n\r\n" + body[:5])
        assert client.predict("task-2", "a")["label"] in "abc" and not select.select([dawdling], [], [], 0)[0]
        assert len(held.rows) == 2
        assert b"504" in dawdling.recv(100)
        dawdling.close()


def serve(words: list[str], log: int) -> None:
    """Run `lotr serve` in a fork, which has imported everything."""
    sys.stderr = os.fdopen(log, "w")
    app(["serve", *words])


def test_sigterm_finishes_what_has_begun(folder: Path) -> None:
    words = [str(folder / "bank"), "--port", "0", "--max-wait", "2000"]
    reads, writes = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=serve, args=(words, writes))
    process.start()
    os.close(writes)
    with os.fdopen(reads) as log:
        line = next(line for line in log if '"listening"' in line)
        client = Client(int(line.split("127.0.0.1:")[1].split('"')[0]))
        assert client.send("GET", "/readyz")[0] == 200
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(client.predict("task-1", "a")))
        asking.start()
        until(lambda: client.metric("lotr_queue_rows") == 1)
        os.kill(process.pid, signal.SIGTERM)
        asking.join()
        process.join(20)
        lines = log.read()
    assert process.exitcode == 0 and answers[0]["label"] in "abc"
    assert '"event": "request"' in lines and '"task": "task-1"' in lines and '"ended"' in lines


def test_a_server_that_is_told_to_end_when_it_has_just_begun_ends(folder: Path) -> None:
    reads, writes = os.pipe()
    words = [str(folder / "bank"), "--port", "0"]
    process = multiprocessing.get_context("fork").Process(target=serve, args=(words, writes))
    process.start()
    os.close(writes)
    with os.fdopen(reads) as log:
        next(line for line in log if '"listening"' in line)
        os.kill(process.pid, signal.SIGTERM)
        process.join(20)
    assert process.exitcode == 0


def test_settings_that_could_serve_nobody_or_let_everybody_in_are_refused() -> None:
    wrongs = {"max_batch": 0}, {"max_wait": -1.0}, {"timeout": 0.0}, {"max_queue": 3}, {"token": ""}
    for wrong in (*wrongs, {"admin_token": ""}):
        with pytest.raises(ConfigError):
            ServeSettings(**wrong)  # type: ignore[arg-type]


TASKS, CLIENTS, VERSIONS = 50, 32, 4
REQUESTS = int(os.environ.get("LOTR_SERVE_REQUESTS", "320"))  # the long form: 2000, or hours


def test_every_answer_is_that_of_the_task_at_that_time(tmp_path: Path) -> None:
    """Tasks are added, replaced and removed under load; labels tell which version answered."""
    begun, written = Counter[int](), Counter[int]()  # number of the last write to each task
    answers: list[tuple[int, int, Any, str, range]] = []
    done = threading.Event()
    with encoder_bank(tmp_path) as bank:

        def version(task: int, n: int) -> Any:
            labels = tuple(f"{n}.{label}" for label in range(2 + (task + n) % 3))
            return banks.task(bank, str(task), VERSIONS * task + n % VERSIONS, labels)

        def write(turn: int) -> None:
            task = 7 * turn % TASKS
            n = begun[task] = written[task] + 1
            if turn % 5 == 4 and str(task) in bank:
                bank.remove(str(task))
            else:
                bank.add(version(task, n), replace=True)
            written[task] = n

        def keep_writing() -> None:
            turns = itertools.count(TASKS)
            while not done.wait(0.003):
                write(next(turns))

        def ask(client: Client, turn: int) -> None:
            task, text, before = 13 * turn % TASKS, TEXTS[turn % 3], written[13 * turn % TASKS]
            status, answer, _ = client.send("POST", f"/v1/tasks/{task}/predict", {"text": text})
            answers.append((status, task, answer, text, range(before, begun[task] + 1)))

        for turn in range(TASKS):
            write(turn)
        with serving(tmp_path) as client:
            writer = threading.Thread(target=keep_writing)
            writer.start()
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(lambda turn: ask(client, turn), range(REQUESTS)))
            done.set()
            writer.join()
        assert {status for status, *_ in answers} <= {200, 404}
        right = [own for status, *own in answers if status == 200]
        assert len(right) > REQUESTS / 2
        numbers = {(task, int(answer["predictions"][0]["label"].split(".")[0])) for task, answer, *_ in right}
        assert len({n for _, n in numbers}) > 1
        bank.remove(*bank.names())
        bank.add_many(replace(version(task, n), name=f"{task}@{n}") for task, n in numbers)
        served = load_served(bank)
        for task, answer, text, possible in right:
            one = answer["predictions"][0]
            n = int(one["label"].split(".")[0])
            assert answer["task"] == str(task) and n in possible
            assert_scores(one, alone(served, f"{task}@{n}", text))
