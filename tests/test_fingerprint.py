"""A fingerprint tells base models apart by every tensor, and does not cry wolf."""

from __future__ import annotations

import base64
import itertools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from conftest import Architecture, bert, gpt2, llama
from lotr import CheckpointError
from lotr.files.fingerprint import changed, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def taken(model: nn.Module) -> str:
    text = fingerprint(model)
    assert text is not None
    return text


def test_a_change_at_either_end_of_any_tensor_is_told_by_its_name(architecture: Architecture) -> None:
    model = architecture.make()
    before, parameters = taken(model), dict(model.named_parameters())
    assert changed(before, model) == changed(before, taken(model)) == []
    names = list(parameters)
    for at, chosen in itertools.product((0, -1), (names[::2], names[1::2])):
        for step in (0.5, -0.5):
            with torch.no_grad():
                for name in chosen:
                    parameters[name].view(-1)[at] += step
            told = chosen if step > 0 else []
            assert sorted(changed(before, model)) == sorted(changed(before, taken(model))) == sorted(told)


def test_numbers_along_the_whole_length_are_looked_at() -> None:
    model = nn.Linear(64, 64, bias=False)
    before = taken(model)
    for part in range(8):  # an eighth of the rows
        other = nn.Linear(64, 64, bias=False)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            other.weight[8 * part : 8 * part + 8] += 1
        assert changed(before, other) == ["weight"]


@pytest.mark.parametrize("one", DTYPES, ids=str)
def test_half_and_full_precision_of_one_model_agree(one: torch.dtype) -> None:
    for make in (bert, llama):
        before = taken(make().to(one))
        for other in DTYPES:
            assert changed(before, make().to(one).to(other)) == changed(before, taken(make().to(other))) == []


def test_a_quantised_model_is_told_by_what_stayed_plain() -> None:
    before, model = taken(bert()), bert()
    for layer in model.bert.encoder.layer:
        old = layer.attention.self.query.weight
        layer.attention.self.query.weight = nn.Parameter(old.to(torch.uint8), requires_grad=False)
        layer.attention.self.key.weight = nn.Parameter(old.to(torch.float8_e4m3fn), requires_grad=False)
    assert changed(before, model) == changed(taken(model), bert()) == []
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(2.0)
    assert changed(before, model) == ["bert.embeddings.LayerNorm.weight"]
    assert fingerprint(nn.Linear(2, 2, device="meta")) is None


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_model_is_read_where_its_weights_lie(tmp_path: Path, where: str) -> None:
    before = taken(llama())

    def offloaded(model: nn.Module) -> nn.Module:
        if where == "memory":
            accelerate.cpu_offload(model, torch.device("cpu"))
        else:
            accelerate.disk_offload(
                model, tempfile.mkdtemp(dir=tmp_path), execution_device=torch.device("cpu")
            )
        assert model.model.layers[1].mlp.up_proj.weight.is_meta
        return model

    model = offloaded(llama())
    assert changed(before, model) == [] and taken(model) == before
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1
    assert changed(before, offloaded(other)) == ["model.layers.1.mlp.up_proj.weight"]


def test_an_offloaded_model_that_stays_in_its_files_is_read_there(tmp_path: Path) -> None:
    llama().bfloat16().save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "none"}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, **options)
    assert model.lm_head.weight.is_meta and taken(model) == taken(llama().bfloat16())


def test_a_tied_tensor_counts_once_and_agrees_with_one_that_is_not() -> None:
    tied, untied = gpt2(), gpt2()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert changed(taken(tied), untied) == changed(taken(untied), tied) == []
    before = taken(untied)
    with torch.no_grad():
        untied.lm_head.weight += 1
    assert changed(before, untied) == ["lm_head.weight"]


@pytest.mark.parametrize("size", [50, 61, 80])
def test_a_resized_vocabulary_is_compared_where_both_have_rows(size: int) -> None:
    before, model = taken(bert()), bert()
    model.resize_token_embeddings(size)
    assert changed(before, model) == changed(before, taken(model)) == []
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[:40] += 1
    assert changed(before, model) == ["bert.embeddings.word_embeddings.weight"]


def test_what_an_adapter_brings_itself_is_no_part_of_the_base() -> None:
    before, other = fingerprint(bert(), ("classifier", "bert.pooler")), bert()
    assert before is not None
    with torch.no_grad():
        other.classifier.weight += 1
        other.bert.pooler.dense.weight += 1
    assert changed(before, other) == []


def _shaped(*shape: int) -> bytes:
    return json.dumps({"a": [shape, [0] * 16]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"a": 5}',
        b'{"a": [[2], [1, 2]], "b": [["x"], []]}',
        b'{"a": [[2], 7]}',
        _shaped(0, 4),
        _shaped(-1),
        _shaped(10**30),
        b"[" * 9999,
        b"\xff",
    ],
    ids=lambda content: str(content[:20]),
)
def test_a_damaged_fingerprint_is_told(content: bytes) -> None:
    for text in (base64.b64encode(zlib.compress(content)).decode(), content.decode("latin-1")):
        with pytest.raises(CheckpointError, match="fingerprint of a base model is damaged"):
            changed(text, bert())
