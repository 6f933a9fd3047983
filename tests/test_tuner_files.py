"""What is on disk, who reads it, and what a reader refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save_file
from torch import nn

import lotr
from conftest import ARCHITECTURES, bert, gpt2, t5, tokens
from lotr import CheckpointError, LotrConfig, inspect
from tuner_contract import outputs

INPUTS = {"input_ids": tokens()}
FILE = "adapter_model.safetensors"

READ_IN_A_FRESH_PROCESS = """
import sys, torch, transformers
from peft import PeftModel
folder, *names = sys.argv[1:]
def answers(name, adapter, **options):
    kept = torch.load(f"{folder}/{name}.pt", weights_only=True)
    config = transformers.AutoConfig.from_pretrained(f"{folder}/{name}-base")
    base = getattr(transformers, config.architectures[0]).from_pretrained(f"{folder}/{name}-base")
    model = PeftModel.from_pretrained(base, f"{folder}/{adapter}", **options).eval()
    with torch.no_grad():
        return model(**kept["inputs"]).logits, kept["logits"]
for name in names:
    torch.testing.assert_close(*answers(name, f"{name}-lora"), atol=2e-6, rtol=1e-5)
assert "lotr" not in sys.modules
import lotr
for name in names:
    for low in (False, True):
        assert torch.equal(*answers(name, name, low_cpu_mem_usage=low)), (name, low)
"""


def adapted(model: nn.Module | None = None, **kwargs: Any) -> PeftModel:
    defaults = {"r": 4, "target_modules": ["query", "value"], "init_weights": False, "seed": 0}
    return get_peft_model(model or bert(), LotrConfig(**(defaults | kwargs))).eval()


# ---- layout


def test_keys_are_those_of_the_documented_layout(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    layer = "base_model.model.bert.encoder.layer.{}.attention.self.{}.lotr_C.weight"
    group = "base_model.model.lotrbasis.{}_32x32.lotr_{}.weight"
    expected = {layer.format(n, p): (4, 4) for n in range(3) for p in ("query", "value")}
    expected |= {group.format(p, "U"): (32, 4) for p in ("query", "value")}
    expected |= {group.format(p, "V"): (4, 32) for p in ("query", "value")}
    assert {key: tuple(t.shape) for key, t in load_file(tmp_path / FILE).items()} == expected


def test_the_configuration_says_what_the_adapter_is(tmp_path: Path) -> None:
    adapted(method="lotr_joint").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LOTR" and config["method"] == "lotr_joint" and config["r"] == 4
    assert config["modes"] == ["layer", "projection"] and config["init"] == "orthonormal"
    assert config["inference_mode"] is True


def test_a_file_with_a_head_holds_that_head_once_and_nothing_else(tmp_path: Path) -> None:
    model = adapted(task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    numbers = model.get_nb_trainable_parameters()[0]
    content = load_file(tmp_path / FILE)
    assert sum(t.numel() for t in content.values()) == numbers
    assert (tmp_path / FILE).stat().st_size <= 4 * numbers + 4096 + 100 * len(content)
    assert {key for key in content if "lotr" not in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


def test_a_half_precision_adapter_takes_half_the_bytes(tmp_path: Path) -> None:
    model = adapted().half()
    model.save_pretrained(tmp_path)
    content = load_file(tmp_path / FILE)
    numbers = sum(t.numel() for t in content.values())
    assert (tmp_path / FILE).stat().st_size <= 2 * numbers + 4096 + 100 * len(content)


def test_the_file_of_a_container_does_not_tell_where_its_basis_is() -> None:
    """The root of a container is called part by part, so the basis sits on the first adapted layer."""

    def container() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))

    x = torch.randn(2, 6)
    files = []
    for targets in (["0", "1", "2"], ["1", "2"]):
        config = LotrConfig(r=2, target_modules=targets, init_weights=False)
        model = get_peft_model(container(), config)
        files.append(get_peft_model_state_dict(model))
        again = get_peft_model(container(), LotrConfig(r=2, target_modules=targets, seed=9))
        set_peft_model_state_dict(again, files[-1])
        assert torch.equal(again(x), model(x)) and not torch.equal(model(x), container()(x))
        assert torch.equal(model.unload()(x), container()(x))
    bases = [{key for key in file if "lotrbasis" in key} for file in files]
    assert all(key.startswith("base_model.model.lotrbasis.") for keys in bases for key in keys)


def test_a_model_inside_a_container_saves_and_loads(tmp_path: Path) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = bert()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.auto_model(x).logits

    model = nn.Sequential(First(), nn.Identity()).eval()
    config = LotrConfig(r=4, target_modules=["query"], init_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(First(), nn.Identity()).eval(), tmp_path)
    assert torch.equal(loaded(INPUTS["input_ids"]), model(INPUTS["input_ids"]))


# ---- readers


def test_every_architecture_is_read_in_a_fresh_process_and_its_lora_without_the_library(
    tmp_path: Path,
) -> None:
    for name, architecture in ARCHITECTURES.items():
        model = adapted(architecture.make(), target_modules=architecture.targets)
        inputs = architecture.inputs()
        torch.save({"inputs": inputs, "logits": outputs(model, inputs)}, tmp_path / f"{name}.pt")
        model.save_pretrained(tmp_path / name)
        architecture.make().save_pretrained(tmp_path / f"{name}-base")
        lotr.export(tmp_path / name, tmp_path / f"{name}-lora")
    command = [sys.executable, "-c", READ_IN_A_FRESH_PROCESS, str(tmp_path), *ARCHITECTURES]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "auto, make, settings",
    [
        (AutoPeftModelForSequenceClassification, bert, {"task_type": "SEQ_CLS"}),
        (AutoPeftModelForCausalLM, gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"]}),
    ],
)
def test_auto_classes_find_base_and_adapter(auto: Any, make: Any, settings: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    model = adapted(base, **settings)
    model.save_pretrained(tmp_path / "adapter")
    number = {"num_labels": 3} if make is bert else {}
    loaded = auto.from_pretrained(tmp_path / "adapter", **number)
    assert torch.equal(outputs(loaded.eval(), INPUTS), outputs(model, INPUTS))


def test_a_second_adapter_is_loaded_beside_the_first(tmp_path: Path) -> None:
    other = adapted(r=2, seed=5)
    other.save_pretrained(tmp_path)
    model = adapted()
    before = outputs(model, INPUTS)
    model.load_adapter(tmp_path, adapter_name="other")
    assert torch.equal(outputs(model, INPUTS), before)
    model.set_adapter("other")
    assert torch.equal(outputs(model, INPUTS), outputs(other, INPUTS))


def test_a_loaded_adapter_is_trained_only_when_asked(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=trainable)
        assert any(p.requires_grad for p in model.parameters()) is trainable


def test_loading_an_injected_adapter_without_memory_leaves_nothing_on_meta() -> None:
    state = get_peft_model_state_dict(
        inject_adapter_in_model(LotrConfig(r=2, target_modules=["query"]), bert())
    )
    model = inject_adapter_in_model(LotrConfig(r=2, target_modules=["query"]), bert(), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())


def test_a_compiled_model_saves_the_same_file(tmp_path: Path) -> None:
    model = adapted()
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    saved, expected = load_file(tmp_path / FILE), get_peft_model_state_dict(model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


@pytest.mark.parametrize("first, second", [(True, False), (False, True), (True, True)])
def test_a_state_dict_carries_between_plain_and_compiled_models(first: bool, second: bool) -> None:
    def model(compiled: bool) -> nn.Module:
        return torch.compile(bert(), backend="eager") if compiled else bert()

    source = inject_adapter_in_model(
        LotrConfig(r=2, target_modules=["query"], init_weights=False), model(first)
    )
    state = get_peft_model_state_dict(source)
    assert not any("_orig_mod" in key for key in state)
    config = LotrConfig(r=2, target_modules=["query"], seed=9)
    target = inject_adapter_in_model(config, model(second), state_dict=state)
    set_peft_model_state_dict(target, state)
    loaded = get_peft_model_state_dict(target)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_state_dict_saved_by_torch_holds_numbers_and_no_modules(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LotrConfig(r=2, target_modules=["query"], magnitude="per_output"))
    torch.save(model.state_dict(), tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_a_group_named_by_a_longer_path_is_matched_by_its_tail() -> None:
    """A module without a number names its group by the whole path, and architectures rename prefixes."""
    modes = {"modes": (), "target_modules": ["pooler.dense"], "r": 2}
    bare = inject_adapter_in_model(LotrConfig(**modes, init_weights=False, seed=1), bert().bert)
    state = {
        f"bert.{k}" if not k.startswith("lotrbasis") else k: t
        for k, t in get_peft_model_state_dict(bare).items()
    }
    whole = inject_adapter_in_model(LotrConfig(**modes, seed=2), bert())
    assert set(get_peft_model_state_dict(whole)) != set(state)
    set_peft_model_state_dict(whole, state)
    loaded = get_peft_model_state_dict(whole)
    assert all(torch.equal(a, b) for a, b in zip(loaded.values(), state.values(), strict=True))


# ---- what a reader refuses


def _spoiled(folder: Path, spoil: Any) -> Path:
    adapted().save_pretrained(folder)
    content = load_file(folder / FILE)
    spoil(content)
    save_file(content, folder / FILE)
    return folder


FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lotr_C.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.pop(FIRST), r"1 missing, first .*layer\.0\.attention\.self\.query\.lotr_C"),
        (lambda c: c.update({FIRST.replace("query", "key"): torch.zeros(4, 4)}), "1 unexpected, first .*key"),
        (
            lambda c: c.pop("base_model.model.lotrbasis.query_32x32.lotr_U.weight"),
            "1 missing, first .*lotr_U",
        ),
    ],
)
@pytest.mark.parametrize("low", [False, True])
def test_a_file_that_does_not_fit_the_model_is_refused(
    spoil: Any, message: str, low: bool, tmp_path: Path
) -> None:
    folder = _spoiled(tmp_path, spoil)
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(bert(), folder, low_cpu_mem_usage=low)


@pytest.mark.parametrize("field, value", [("scaling", 9.0), ("r", 3), ("modes", []), ("unheard", 1)])
def test_a_changed_field_is_refused_by_peft_alone_until_its_checksum_is_taken_out(
    tmp_path: Path, field: str, value: object
) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(config))
    for read in (lambda: PeftModel.from_pretrained(bert(), tmp_path), lambda: inspect(tmp_path)):
        with pytest.raises(CheckpointError, match=r"take the line 'checksum' out of adapter_config\.json"):
            read()
    if field == "scaling":
        del config["checksum"]
        path.write_text(json.dumps(config))
        assert PeftModel.from_pretrained(bert(), tmp_path).peft_config["default"].scaling == 9.0


@pytest.mark.parametrize("format", [None, 1, 3])
def test_a_folder_of_another_format_is_refused_in_one_sentence(format: int | None, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"format": format, "order": "auto"}
    path.write_text(json.dumps(config))
    for read in (lambda: PeftModel.from_pretrained(bert(), tmp_path), lambda: inspect(tmp_path)):
        with pytest.raises(
            CheckpointError, match=f"saved in format {format or 1}, and .* reads format 2 alone"
        ):
            read()


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = _spoiled(tmp_path, lambda c: c.update({FIRST: torch.zeros(3, 3)}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(bert(), folder)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    adapted(t5(), target_modules=["q", "v"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target_modules="):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_a_loaded_adapter_keeps_the_order_of_modules_that_it_was_made_in(tmp_path: Path) -> None:
    adapted(method="tenslora_qkv").save_pretrained(tmp_path)
    loaded = LotrConfig.from_pretrained(tmp_path)
    targets = loaded.recorded_plan().targets
    assert lotr.plan(bert(), loaded).targets == targets
    loaded.targets = loaded.targets[::-1]
    assert lotr.plan(bert(), loaded).targets == targets[::-1]
    loaded.targets = loaded.targets[1:]  # another set of modules: left alone
    assert lotr.plan(bert(), loaded).targets == targets


def test_a_head_alone_is_an_adapter_of_any_method() -> None:
    config = LotrConfig(method="lorta", target_modules=DUMMY_TARGET_MODULES, modules_to_save=["classifier"])
    model = get_peft_model(bert(), config)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in bert().classifier.parameters())
