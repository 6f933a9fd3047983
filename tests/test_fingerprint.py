"""A fingerprint tells base models apart by every tensor, and does not cry wolf."""

from __future__ import annotations

import base64
import itertools
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


def in_memory(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))


def in_its_files(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "base")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    options: Any = {
        "device_map": places | {"model.layers": "disk", "lm_head": "disk"},
        "offload_folder": folder / "none",
    }
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("offloaded", [in_memory, on_disk, in_its_files])
def test_an_offloaded_model_is_read_where_its_weights_lie(tmp_path: Path, offloaded: Any) -> None:
    before, other = taken(llama().bfloat16()), llama().bfloat16()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1
    model, other = offloaded(llama().bfloat16(), tmp_path / "a"), offloaded(other, tmp_path / "b")
    assert model.lm_head.weight.is_meta and taken(model) == before
    assert changed(before, model) == [] and changed(before, other) == ["model.layers.1.mlp.up_proj.weight"]


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


@pytest.mark.parametrize(
    "content", [b"[]", b'{"a": 5}', b'{"a": [[2], [1, 2]]}', b'{"a": [["x"], []]}', b"[" * 9999, b"\xff"]
)
def test_a_damaged_fingerprint_is_told(content: bytes) -> None:
    for text in (base64.b64encode(zlib.compress(content)).decode(), content.decode("latin-1")):
        with pytest.raises(CheckpointError, match="fingerprint of a base model is damaged"):
            changed(text, bert())
