"""Language models over HTTP: rows of different tasks share steps, and each text is what it would be alone."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

pytest.importorskip("fastapi")

from banks import decoder_bank, decoder_task, on
from lotr import CoreBank
from lotr.bank.cache import LoadedTask
from lotr.serving.decoder import Decoder, Prompt, _Writer
from lotr.training.tasks.served import Served, load_served
from saved_models import save_hybrid
from servers import Client, Counted, serving, until

PROMPTS = ["the red thing", "a very old blue", "what colour is the thing here ?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """A bank of five tasks on a small language model."""
    folder = tmp_path_factory.mktemp("decoder")
    decoder_bank(folder, tasks=5).close()
    return Counted(load_served(folder / "bank"))


@pytest.fixture(scope="module")
def served(model: Counted) -> Served:
    return model.served


@pytest.fixture
def slow(model: Counted, monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setattr(model, "pause", 0.3)
    return model


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    with serving(Path(), served, max_wait=50, max_tokens=32) as client:
        yield client


def alone(served: Served, task: str, prompt: str, tokens: int) -> str:
    """What transformers' own loop writes to one prompt, as it reads behind it."""
    inputs = served.tokenizer(prompt, return_tensors="pt")
    with served.model.select([task]):
        ids = served.model.get_base_model().generate(
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    before, whole = (
        served.tokenizer.decode(own, skip_special_tokens=True) for own in (inputs["input_ids"][0], ids[0])
    )
    assert whole.startswith(before)
    return whole[len(before) :]


def complete(client: Client, task: str, prompt: Any, tokens: int = 12, **options: Any) -> dict[str, Any]:
    body = {"model": task, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}
    status, answer, _ = client.send("POST", "/v1/completions", body)
    assert status == 200, answer
    return answer


def streamed(client: Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    status, text, headers = client.send("POST", path, {**body, "stream": True})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream"), text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(one) for one in events]


def test_texts_are_those_of_the_row_alone_and_rows_leave_when_done(model: Counted) -> None:
    lengths = [3, 9, 14, 6, 11, 4]
    asked = [(f"task-{n % 5}", PROMPTS[n % 3], length) for n, length in enumerate(lengths)]
    expected = [alone(model.served, *one) for one in asked]
    assert len(set(expected)) == len(asked)
    model.rows.clear()
    together = {"max_batch": 6, "max_wait": 60_000}
    with serving(Path(), model.served, **together) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: complete(client, *one), asked))
    for one, text, answer in zip(asked, expected, answers, strict=True):
        choice = answer["choices"][0]
        assert choice["text"] == text and choice["finish_reason"] in ("length", "stop")
        assert answer["usage"]["completion_tokens"] <= one[2] and answer["model"] == one[0]
    steps = model.rows
    assert steps[0] == 6 and steps == sorted(steps, reverse=True) and steps[-1] < 6


def test_a_stream_is_the_text_in_pieces(client: Client) -> None:
    body = {"model": "task-2", "prompt": PROMPTS, "max_tokens": 9, "temperature": 0.8, "seed": 5}
    whole = complete(client, "task-2", PROMPTS, 9, temperature=0.8, seed=5)
    events = streamed(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    for n, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == n]
        assert "".join(one["text"] for one in own) == choice["text"] and len(own) > 2
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    turns = {"model": "task-1", "messages": [{"role": "user", "content": "what"}], "max_tokens": 5, "seed": 1}
    status, chat, _ = client.send("POST", "/v1/chat/completions", turns)
    assert status == 200 and chat["object"] == "chat.completion"
    pieces = streamed(client, "/v1/chat/completions", turns)
    assert pieces[0]["object"] == "chat.completion.chunk"
    first, *others = [piece["choices"][0]["delta"] for piece in pieces]
    assert first.pop("role") == "assistant" and all(other.keys() == {"content"} for other in others)
    assert "".join(one["content"] for one in (first, *others)) == chat["choices"][0]["message"]["content"]


def test_a_chat_is_its_template_continued(served: Served, client: Client) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "what colour"}]}]
    body = {"model": "task-3", "messages": turns, "max_completion_tokens": 6, "temperature": 0}
    _, answer, _ = client.send("POST", "/v1/chat/completions", body)
    whole = alone(served, "task-3", "user what colour assistant", 6)
    assert " " + answer["choices"][0]["message"]["content"] == whole


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_layers_without_keys_and_values_forget_the_rows_that_leave(kind: str, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_hybrid(tmp_path / "model", kind))
    with on(tmp_path, base, target_modules=["q_proj", "v_proj"]) as bank:
        bank.add_many(decoder_task(bank, f"task-{n}", n) for n in range(2))
    decoder = Decoder(load_served(tmp_path / "bank"))
    prompts = [
        decoder.encode(f"task-{n}", [PROMPTS[n]], tokens, 32, temperature=0)[0]
        for n, tokens in enumerate((3, 9))
    ]
    together = dict(decoder.run(prompts))
    assert [together[n] for n in range(2)] == [next(decoder.run([prompt]))[1] for prompt in prompts]


def test_a_row_that_has_ended_is_answered_whatever_breaks_after_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "reorder_cache", None)
    decoder = Decoder(served)
    prompts = [decoder.encode("task-0", ["the red"], tokens, 32, temperature=0)[0] for tokens in (2, 5)]
    answers = dict(decoder.run(prompts))
    assert answers[0].reason == "length" and isinstance(answers[1], TypeError)


def test_a_temperature_near_zero_is_zero(client: Client) -> None:
    texts = [complete(client, "task-1", PROMPTS[0], temperature=t)["choices"][0]["text"] for t in (0, 1e-39)]
    assert texts[0] == texts[1]


def test_fields_that_change_nothing_are_taken(client: Client) -> None:
    body = {"model": "task-2", "max_tokens": 5, "temperature": 0}
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "store": False,
        "seed": None,
    }
    neutral |= {"max_completion_tokens": 5, "n": None, "metadata": {"from": "a test"}}
    own = {"prompt": "a", "echo": False, "best_of": 1}
    turns = {"messages": [{"role": "user", "content": "a", "refusal": None, "name": "me"}]}
    chat = {
        **turns,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logprobs": False,
    }
    for path, more in (("completions", own), ("chat/completions", chat)):
        assert client.send("POST", f"/v1/{path}", {**body, **neutral, **more})[0] == 200


def test_a_seed_decides_what_is_drawn_whoever_is_beside_it(client: Client) -> None:
    drawn = {"temperature": 1.5, "seed": 7}
    single = complete(client, "task-4", PROMPTS[0], **drawn)["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        tasks = ["task-0", "task-4", "task-1", "task-4"]
        mixed = list(pool.map(lambda task: complete(client, task, PROMPTS[0], **drawn), tasks))
    texts = [answer["choices"][0]["text"] for answer in mixed]
    assert texts[1] == texts[3] == single and texts[0] != single
    other = complete(client, "task-4", PROMPTS[0], temperature=1.5, seed=8)["choices"][0]["text"]
    assert other != single


def test_a_text_ends_before_what_it_should_stop_at(client: Client) -> None:
    words = complete(client, "task-0", PROMPTS[0], 12)["choices"][0]["text"].split(" ")
    stop = " ".join(words[3:5])
    first = " ".join(words).index(stop)
    answer = complete(client, "task-0", PROMPTS[0], 12, stop=["never", stop])["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (" ".join(words)[:first], "stop")
    body = {"model": "task-0", "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0, "stop": stop}
    events = streamed(client, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == " ".join(words)[:first]


def test_characters_of_several_tokens_are_given_whole() -> None:
    class Bytes:
        """A tokenizer whose tokens are bytes."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    pieces: list[str] = []
    content = "a é 任务 🙂!".encode()
    prompt = Prompt(
        LoadedTask(torch.empty(0)), [1], len(content), temperature=0, stop=["務", "任x"], emit=pieces.append
    )
    writer = _Writer(Bytes(), prompt)
    reasons = [writer.write(torch.nn.functional.one_hot(torch.tensor(b), 256), set()) for b in content]
    assert "".join(pieces) == writer.text == content.decode()
    assert reasons == [None] * (len(content) - 1) + ["length"]
    assert len(pieces) == len(content.decode()) - 1  # 任 waited to see whether x comes


def test_a_task_whose_numbers_overflow_fails_alone(served: Served, client: Client) -> None:
    with CoreBank.open(served.bank.path, writable=True) as bank:
        usual = decoder_task(bank, "huge")
        bank.add(replace(usual, numbers=3e38 * usual.numbers.sign()))
    tasks = ["task-0", "huge", "task-1"]
    bodies = [{"model": task, "prompt": PROMPTS[0], "max_tokens": 6, "seed": 2} for task in tasks]
    expected = [client.send("POST", "/v1/completions", bodies[n])[1]["choices"] for n in (0, 2)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda body: client.send("POST", "/v1/completions", body)[:2], bodies))
    assert [status for status, _ in answers] == [200, 500, 200]
    assert [answers[n][1]["choices"] for n in (0, 2)] == expected


def test_a_stream_that_passes_its_deadline_ends_with_an_error(slow: Counted) -> None:
    body = {"model": "task-1", "prompt": "a", "max_tokens": 32, "temperature": 0, "stream": True}
    with serving(Path(), slow.served, timeout=1.5) as client:
        status, text, _ = client.send("POST", "/v1/completions", body)
        steps = len(slow.rows)
    *pieces, last, _ = text.split("\n\n")
    assert status == 200 and pieces and '"code": "timeout"' in last
    assert len(slow.rows) <= steps + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_row(slow: Counted, client: Client, stream: bool) -> None:
    slow.rows.clear()
    path, ended = "/v1/completions", 'lotr_request_seconds_count{route="/v1/completions"}'
    before = client.metric(ended)
    body = {"model": "task-1", "prompt": "a", "max_tokens": 32, "stop": "x", "stream": stream}
    client.leave(path, body, wait=lambda: until(lambda: len(slow.rows) > 0))
    until(lambda: client.metric(ended) > before)
    steps = len(slow.rows)
    complete(client, "task-1", "a", 1)  # runs when the batch before it has ended
    assert len(slow.rows) <= steps + 2
