"""An adapter on a weight that the model uses twice: merged, reloaded and exported answer alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from conftest import ARCHITECTURES, SIZES, VOCABULARY, gpt2, llama, pico, t5, tokens
from lotr import LotrConfig, export
from lotr.adapters.export import merge
from tuner_contract import outputs


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def masked_bert() -> nn.Module:
    return pico("BertForMaskedLM", vocab_size=VOCABULARY, **SIZES)


@pytest.mark.parametrize(
    "make, targets",
    [
        (tied_llama, ["lm_head", "q_proj"]),
        (masked_bert, ["decoder"]),
        (gpt2, ["lm_head"]),
        (t5, ["lm_head", "q"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merged_reloaded_and_exported_answer_alike(make: Any, targets: list[str], tmp_path: Path) -> None:
    base = make()
    inputs = ARCHITECTURES["t5"].inputs() if make is t5 else {"input_ids": tokens()}
    before = outputs(base, inputs)
    base.save_pretrained(tmp_path / "base")
    config = LotrConfig(r=4, target_modules=targets, init_weights=False)
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config).eval()
    expected = outputs(model, inputs)
    assert not torch.equal(expected, before)

    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), expected, atol=5e-6, rtol=1e-5)
    model.unmerge_adapter()
    inner = model.get_base_model()
    heads = inner.get_output_embeddings().get_base_layer().weight, inner.get_input_embeddings().weight
    assert heads[0] is heads[1]  # tied again
    assert torch.equal(outputs(model, inputs), expected)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, inputs), expected)
    export(tmp_path / "adapter", tmp_path / "lora")
    exported = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(exported, inputs), expected, atol=5e-6, rtol=1e-5)

    with pytest.warns(UserWarning, match="no longer tied"):
        merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), expected, atol=5e-6, rtol=1e-5)
    with pytest.warns(UserWarning, match="no longer tied"):
        merge(model, tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(reloaded, inputs), expected, atol=5e-6, rtol=1e-5)


def test_any_two_modules_with_one_weight_keep_theirs_when_one_is_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    peft = get_peft_model(model, LotrConfig(r=2, target_modules=["1"], init_weights=False)).eval()
    x = torch.randn(3, 4)
    expected = peft(x)
    torch.testing.assert_close(peft.merge_and_unload()(x), expected)
