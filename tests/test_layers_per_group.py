"""Layers that share factors in runs: the groups, and that nothing else notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lotr
from lotr import LotrConfig
from lotr.errors import ConfigError
from lotr.sharing.blocks import Target
from lotr.sharing.make_plan import make_plan
from tuner_contract import outputs

IDS = {"input_ids": torch.arange(5, 21).view(2, 8)}
NAMES = [f"{p}_proj-layers{a}to{a + 3}_{o}x32" for a in (0, 4) for p, o in (("q", 32), ("v", 16))]


def _model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6}
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=1, **sizes)
    return LlamaForCausalLM(config).eval()


def _config(**fields: Any) -> LotrConfig:
    fields = {"r": 3, "layers_per_group": 4, "init_weights": False, **fields}
    return LotrConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)


def test_layers_share_in_order_and_the_rest_is_a_group_too() -> None:
    groups = lotr.plan(_model(), _config()).groups
    assert [group.name for group in groups] == NAMES
    assert [len(group.sites) for group in groups] == [4, 4, 2, 2]
    joint = lotr.plan(_model(), _config(method="lotr_joint", layers_per_group=5)).groups
    assert [(group.name, len(group.sites)) for group in joint] == [
        ("layers0to4_32x32", 10),
        ("layers5to9_32x32", 2),
    ]


def test_the_first_number_of_a_path_says_the_layer_whatever_else_is_adapted() -> None:
    def groups(*paths: str) -> dict[str, str]:
        targets = [Target(path, (4, 4), (2, 2)) for path in paths]
        plan = make_plan(targets, ("layer", "projection"), layers_per_group=2)
        return {site.module: group.name for group in plan.groups for site in group.sites}

    experts = [f"layers.{n}.experts.{e}.w" for n in range(4) for e in range(3)]
    blocks = [f"decoder.block.{n}.layer.{at}.q" for n in range(4) for at in (0, 1)]
    for paths, few in ((experts, experts[-3:]), (blocks, blocks[-1:]), ([*blocks, "head3"], ["head3"])):
        everywhere = groups(*paths)
        assert groups(*few) == {path: everywhere[path] for path in few}
    assert groups(*blocks, "head3")["head3"] == "outside_4x4"


def test_a_run_is_an_adapter_on_its_layers() -> None:
    model = get_peft_model(_model(), _config())
    apart = get_peft_model(_model(), _config(layers_per_group=None, layers_to_transform=[0, 1, 2, 3]))
    apart.add_adapter("rest", _config(layers_per_group=None, layers_to_transform=[4, 5]))
    apart.base_model.set_adapter(["default", "rest"])
    numbers = [{n: p for n, p in m.named_parameters() if "lotr" in n.lower()} for m in (model, apart)]
    with torch.no_grad():
        for name, own in numbers[1].items():
            query, value = NAMES[2:] if ".rest" in name else NAMES[:2]
            path = name.replace("q_proj_32x32", query).replace("v_proj_16x32", value)
            own.copy_(numbers[0][path.replace(".rest", ".default")])
    assert len(numbers[0]) == len(numbers[1])
    assert torch.equal(outputs(model, IDS), outputs(apart, IDS))
    assert not torch.equal(outputs(model, IDS), outputs(_model(), IDS))


def test_it_is_saved_merged_exported_and_a_basis(tmp_path: Path) -> None:
    model = get_peft_model(_model(), _config()).eval()
    expected = outputs(model, IDS)
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(_model(), tmp_path / "a").eval()
    assert torch.equal(outputs(loaded, IDS), expected)
    lotr.export(tmp_path / "a", tmp_path / "lora")
    lora = PeftModel.from_pretrained(_model(), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(lora, IDS), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs(loaded.merge_and_unload(), IDS), expected, atol=1e-5, rtol=1e-4)

    # an adapter on the last layers alone keeps the factors of their run
    config = _config(r=None, layers_per_group=None, basis=str(tmp_path / "a"), layers_to_transform=[4, 5])
    last = get_peft_model(_model(), config)
    assert config.layers_per_group == 4
    factors = {n: p for n, p in model.named_parameters() if "lotr_U" in n or "lotr_V" in n}
    kept = {n: p for n, p in last.named_parameters() if "lotr_U" in n or "lotr_V" in n}
    assert len(kept) == 4 and all(torch.equal(p, factors[n]) for n, p in kept.items())

    bank = lotr.CoreBank.create(tmp_path / "bank", basis=tmp_path / "a", dtype="float32")
    bank.add_adapter("one", tmp_path / "a")
    answers = bank.wrap(_model()).eval()
    torch.testing.assert_close(
        answers(**IDS, adapter_names=["one", "one"]).logits, expected, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_what_is_no_number_of_layers_is_refused(n: Any) -> None:
    with pytest.raises(ConfigError, match=r"layers_per_group=.* is no number of layers\. Use 1 or more"):
        _config(layers_per_group=n)


def test_layers_that_share_nothing_have_no_groups() -> None:
    with pytest.raises(ConfigError, match=r"layers_per_group=4 .*modes=\(\) share along none"):
        _config(modes=())
