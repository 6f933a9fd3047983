"""What `lotr.compress` reads, and what it refuses by name before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lotr
from conftest import bert, tokens
from loras import BASE, WEIGHTS, dense, edit, lora
from lotr import CheckpointError, ConfigError, LotrConfig
from lotr.compression.sources import find_adapters, open_source

CONFIG = "adapter_config.json"


def _config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def _rename(folder: Path, change: Callable[[str], str]) -> None:
    save_file({change(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "lora_alpha": 7},
        {"use_rslora": True},
        {"rank_pattern": {"query": 5}, "alpha_pattern": {"layer.1.*value": 11}},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_are_those_that_peft_applies(
    fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    lora(tmp_path, **fields)
    edit(tmp_path, lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    expected = dense(PeftModel.from_pretrained(bert(), str(tmp_path)))
    source = open_source(tmp_path)
    assert source.shapes.keys() == expected.keys()
    with source.reader() as read:
        for module, dW in expected.items():
            A, B = read(module)
            torch.testing.assert_close(B @ A, dW)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("classifier.", "classifier.modules_to_save."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["adapter's name in keys", "no root", "head of older PEFT", "compiled"],
)
def test_keys_of_other_versions_of_peft_are_read(change: Callable[[str], str], tmp_path: Path) -> None:
    for name in "ab":
        lora(tmp_path / name, 1, task_type="SEQ_CLS")
    _rename(tmp_path / "b", change)
    report = lotr.compress(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "bank", bert(), rank=3, dtype="float32"
    )
    assert report.error < 1e-5
    one, other = lotr.CoreBank.open(tmp_path / "bank").read(["a", "b"])[1]
    torch.testing.assert_close(one.numbers, other.numbers)
    assert one.head.keys() == other.head.keys()


def test_a_head_says_how_many_classes_there_are(tmp_path: Path) -> None:
    lora(tmp_path / "a", task_type="SEQ_CLS")
    lora(tmp_path / "b", 1)
    lotr.compress([tmp_path / "a", tmp_path / "b"], tmp_path / "bank", bert(), rank=8)
    with lotr.CoreBank.open(tmp_path / "bank") as bank:
        assert (bank.get("a").task, bank.get("a").labels) == (
            "classification",
            ("0", "1", "2"),
        )
        assert (bank.get("b").task, dict(bank.get("b").head)) == (None, {})


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _bank(folder: Path) -> None:
    lotr.compress([folder.parent / "fine-*"], folder, bert(), rank=2, overwrite=True)


BIAS = "base_model.model.bert.encoder.layer.0.attention.self.query.bias"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (lambda folder: lora(folder, use_dora=True), "is a DoRA.*Train it without use_dora"),
    "pissa": (
        lambda folder: _config(folder, init_lora_weights="pissa"),
        "'pissa'.*path_initial_model_for_weight",
    ),
    "olora": (lambda folder: _config(folder, init_lora_weights="olora"), "'olora'.*Convert it"),
    "embedding": (
        lambda folder: lora(folder, target_modules=["query", "word_embeddings"]),
        "lora_embedding_A.*Train it without",
    ),
    "bias": (
        lambda folder: edit(folder, lambda t: t.update({BIAS: torch.zeros(32)})),
        "a bias that was trained in full.*without modules_to_save and bias",
    ),
    "embeddings in full": (
        lambda folder: lora(folder, modules_to_save=["word_embeddings"]),
        "word_embeddings.*a module that was trained in full.*Leave this adapter out",
    ),
    "another base": (
        lambda folder: _config(folder, base_model_name_or_path="other/model"),
        "trained on 'other/model', and the others on 'pico'.*compress them apart",
    ),
    "another width": (
        lambda folder: _rename(
            folder, lambda key: key.replace("layer.2.attention.self.query", "layer.2.output.dense")
        ),
        r"shape \(32, 32\) at 'bert.encoder.layer.2.output.dense'.*\(32, 64\)",
    ),
    "another model": (
        lambda folder: _rename(folder, lambda key: key.replace("layer.2", "layer.9")),
        "'bert.encoder.layer.9.attention.self.query'.*no linear module.*Near matches",
    ),
    "pickle": (_pickle, "Pickled weights are never read; save it as safetensors"),
    "nan": (
        lambda folder: edit(folder, lambda t: next(iter(t.values())).fill_(float("nan"))),
        "is not finite. Train it again",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 9),
        "truncated or damaged",
    ),
    "half": (
        lambda folder: edit(folder, lambda t: t.pop(next(k for k in t if "lora_B" in k))),
        "one matrix of two",
    ),
    "not a lora": (lambda folder: _config(folder, peft_type="IA3"), "type IA3, and not a LoRA"),
    "bank": (_bank, "is a bank of tasks, not an adapter.*lotr bank export"),
    "magnitude": (
        lambda folder: get_peft_model(
            bert(), LotrConfig(r=2, target_modules=["query"], magnitude="per_output")
        ).save_pretrained(str(folder), save_embedding_layers=False),
        "rescales the weight.*Leave it out",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_compressed_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    for n in range(3):
        lora(tmp_path / f"fine-{n}", n)
    offender = tmp_path / "offender"
    lora(offender, 3)
    change, message = DAMAGES[damage]
    change(offender)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=f"offender.*{message}"):
        lotr.compress([tmp_path / "fine-*", offender], tmp_path / "bank", bert(), rank=2)
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


def test_settings_without_meaning_are_refused(tmp_path: Path) -> None:
    lora(tmp_path / "a")
    lora(tmp_path / "b", 1)
    both = [tmp_path / "a", tmp_path / "b"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rank": 4, "max_error": 0.1}, "rank and max_error.*Give one"),
        ({"max_error": 1.5}, "between 0 and 1"),
        ({"rank": 0}, "leaves nothing"),
        ({"max_bytes": "much"}, "'much' is not understood. Use 20000000, or '20MB'"),
        ({"max_bytes": 100}, "less than a bank of rank 1 takes"),
        ({"modes": ["task", "head"]}, "'head' is none. Name some of: task, layer, projection"),
        ({"core": "tt"}, "free, diagonal"),
        ({"weights": "norm"}, "weights='norm'"),
        ({"weights": {"c": 1.0}}, "'c', which is no adapter"),
        ({"weights": {"a": -1.0}}, "positive number"),
        ({"dtype": "int8"}, "int8"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            lotr.compress(both, tmp_path / "bank", bert(), **options)
    with pytest.raises(ConfigError, match="named twice"):
        lotr.compress([*both, tmp_path / "a"], tmp_path / "bank", bert())
    with pytest.raises(ConfigError, match="is where the adapter"):
        lotr.compress(both, tmp_path / "a", bert(), overwrite=True)
    with pytest.raises(CheckpointError, match=r"does not exist\. Near matches"):
        lotr.compress([tmp_path / "aa"], tmp_path / "bank", bert())
    with pytest.raises(ConfigError, match="matches no folder"):
        lotr.compress([tmp_path / "x*"], tmp_path / "bank", bert())
    lora(tmp_path / "zero", 0)
    _zero(tmp_path / "zero")
    with pytest.raises(ConfigError, match="all of their updates are zero"):
        lotr.compress([tmp_path / "zero"], tmp_path / "bank", bert())


def _zero(folder: Path, part: str = "") -> None:
    edit(folder, lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if part in key])


def test_an_adapter_that_is_zero_becomes_a_task_that_is_the_base_model(tmp_path: Path) -> None:
    lora(tmp_path / "a")
    lora(tmp_path / "zero", 1)
    _zero(tmp_path / "zero")
    report = lotr.compress([tmp_path / "a", tmp_path / "zero"], tmp_path / "bank", bert(), rank=2)
    assert any("zero everywhere, first zero" in line for line in report.advice)
    model = lotr.CoreBank.open(tmp_path / "bank").wrap(bert())
    with torch.no_grad():
        logits = model(input_ids=tokens(), task_ids=["zero"] * 4).logits
        torch.testing.assert_close(logits, bert()(input_ids=tokens()).logits)


@pytest.mark.parametrize("core", ["free", "diagonal"])
def test_a_module_that_no_adapter_changes_costs_one_rank(core: str, tmp_path: Path) -> None:
    for n in range(2):
        lora(tmp_path / f"a-{n}", n)
        _zero(tmp_path / f"a-{n}", "layer.1.attention.self.query")
    report = lotr.compress([tmp_path / "a-*"], tmp_path / "bank", bert(), rank=6, core=core)
    ranks = {group["group"]: group["ranks"] for group in report.groups}
    assert {name for name, pair in ranks.items() if pair == [1, 1]} == {"bert-encoder-layer-1-query_32x32"}


def test_names_are_as_long_as_it_takes_to_tell_folders_apart(tmp_path: Path) -> None:
    for place in ("x/mail/final", "y/mail/final", "z/news"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / CONFIG).write_text("{}")
    assert list(find_adapters([tmp_path / "*" / "mail" / "final", tmp_path / "z/news"])) == [
        "news",
        "x/mail/final",
        "y/mail/final",
    ]


def test_the_base_that_adapters_tell_is_loaded(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / BASE)
    for n in range(2):
        lora(tmp_path / f"a-{n}", n, base=tmp_path / BASE, task_type="SEQ_CLS")
    lotr.compress([tmp_path / "a-*"], tmp_path / "bank", rank=2)
    with lotr.CoreBank.open(tmp_path / "bank") as bank:
        assert bank.base_model == str(tmp_path / BASE)
        bank.basis.check_base(bert())
        other = bert()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 1
        with pytest.raises(CheckpointError, match="fingerprint"):
            bank.basis.check_base(other)
