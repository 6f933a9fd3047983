"""Texts to vectors over HTTP, beside a direct computation with the same task alone."""

from __future__ import annotations

import base64
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

pytest.importorskip("fastapi")

from lotr import CoreBank, Task
from served_banks import bare_encoder_bank, encoder_bank, encoder_task
from servers import Client, serving

TEXTS = ["the red thing", "old old old is blue and very green here", "a"]


def alone(bank: CoreBank, name: str, text: str, bare: bool) -> torch.Tensor:
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
            bank.add(encoder_task(bank, "pairs", 8, pairs=True))
        names = [row["name"] for row in bank.overview()]
        with serving(tmp_path, max_wait=50) as client, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda name: embed(client, name, TEXTS), names))
            for name, (status, answer) in zip(names, answers, strict=True):
                assert status == 200 and answer["model"] == name
                assert [one["index"] for one in answer["data"]] == [0, 1, 2]
                for text, one in zip(TEXTS, answer["data"], strict=True):
                    torch.testing.assert_close(
                        torch.tensor(one["embedding"]), alone(bank, name, text, bare), atol=1e-5, rtol=0
                    )
            first, second = (answer["data"][0]["embedding"] for _, answer in answers[-2:])
            assert (torch.tensor(first) - torch.tensor(second)).norm() > 1e-2
            assert answers[0][1]["usage"] == {"prompt_tokens": 13, "total_tokens": 13}


def test_labels_and_vectors_share_a_server(tmp_path: Path) -> None:
    encoder_bank(tmp_path, tasks=2).close()
    with serving(tmp_path, max_wait=100) as client, ThreadPoolExecutor(8) as pool:
        label, vector = client.predict("task-1", TEXTS[0]), embed(client, "task-1", TEXTS[0])[1]
        labels = pool.map(lambda _: client.predict("task-1", TEXTS[0]), range(4))
        vectors = pool.map(lambda _: embed(client, "task-1", TEXTS[0])[1], range(4))
        assert all(one["scores"] == pytest.approx(label["scores"], abs=1e-5) for one in labels)
        expected = pytest.approx(vector["data"][0]["embedding"], abs=1e-5)
        assert all(one["data"][0]["embedding"] == expected for one in vectors)


def test_base64_is_the_same_numbers(tmp_path: Path) -> None:
    encoder_bank(tmp_path, tasks=1).close()
    with serving(tmp_path) as client:
        vector = embed(client, "task-0", "the red thing")[1]["data"][0]["embedding"]
        packed = embed(client, "task-0", "the red thing", encoding_format="base64")[1]["data"][0]["embedding"]
        assert list(struct.unpack("<32f", base64.b64decode(packed))) == pytest.approx(vector, abs=1e-7)
