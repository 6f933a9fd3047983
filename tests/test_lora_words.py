"""Words of PEFT's LoRA: those that work here, and the sentence that answers the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, optimizers
from torch import nn

from conftest import VOCABULARY, bert, llama, tokens
from lotr import CheckpointError, ConfigError, LotrConfig, export, plan
from test_attention import phi3
from tuner_contract import outputs

INPUTS = {"input_ids": tokens()}


def test_every_field_of_loraconfig_works_or_is_answered() -> None:
    known = {field.name for field in dataclasses.fields(LotrConfig)}
    for field in dataclasses.fields(LoraConfig):
        if field.name not in known:
            with pytest.raises(ConfigError, match=f"{field.name}=True: "):
                LotrConfig(**{field.name: True})


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"alpha_pattern": {"q": 4}}, "one scaling; put modules with another one into a second adapter"),
        ({"ensure_weight_tying": True}, "merging unties them"),
        ({"ensure_weight_tying": False}, "leave it out"),
        ({"lora_ga_config": {"bsz": 2}}, r"lotr\.init_from_data"),
        ({"use_qalora": True}, "no counterpart here"),
    ],
    ids=str,
)
def test_a_word_without_a_counterpart_says_what_to_do(fields: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LotrConfig(**fields)


@pytest.mark.parametrize("name", ["create_loraplus_optimizer", "create_lorafa_optimizer"])
def test_optimisers_that_go_by_loras_names_refuse_ours_and_take_loras(name: str) -> None:
    words: dict[str, Any] = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16}
    if name == "create_lorafa_optimizer":
        words = {"r": 2, "lora_alpha": 2, "lr": 1e-3}
    with pytest.raises(ConfigError, match=rf"{name} .*lotr\.parameter_groups"):
        getattr(optimizers, name)(get_peft_model(llama(), LotrConfig(r=2)), **words)
    groups = getattr(optimizers, name)(get_peft_model(llama(), LoraConfig(r=2)), **words).param_groups
    assert any(group["params"] for group in groups)


def test_sums_are_exact_so_words_of_approximations_are_refused() -> None:
    model = get_peft_model(llama(), LotrConfig(r=2))
    for word, value in (("svd_rank", 4), ("density", 0.5), ("majority_sign_method", "total")):
        with pytest.raises(ConfigError, match=rf"{word}={value!r}: sums .* exact.*lotr\.truncate"):
            model.base_model.add_weighted_adapter(["default"], [1.0], "sum", **{word: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum", weight=1)


@pytest.mark.parametrize("indices", [[3, 5], {"embed_tokens": [3, 5]}], ids=str)
def test_rows_of_new_tokens_are_trained_saved_loaded_and_exported(indices: Any, tmp_path: Path) -> None:
    def config() -> LotrConfig:
        return LotrConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices, init_weights=False)

    model = get_peft_model(llama(), config()).train()
    before = outputs(model, INPUTS)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    (rows,) = (p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    assert rows.requires_grad and rows.grad is not None and rows.shape[0] == 2
    with torch.no_grad():
        rows += 1
    expected = outputs(model.eval(), INPUTS)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "lora")
    for folder in ("adapter", "lora"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / folder).eval()
        torch.testing.assert_close(outputs(loaded, INPUTS), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(outputs(model.merge_and_unload(), INPUTS), expected, atol=2e-6, rtol=1e-5)


def whisper() -> nn.Module:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1,
                         encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                         decoder_ffn_dim=16, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         decoder_start_token_id=1)
    )  # fmt: skip


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=llama().config))


@pytest.mark.parametrize("make, n", [(whisper, 6), (phi3, 3), (llava, 6)])
def test_whisper_phi3_and_llava_have_default_targets(make: Any, n: int) -> None:
    targets = [target.path for target in plan(make(), LotrConfig(r=2)).targets]
    assert len(targets) == n and not any("vision" in path for path in targets)


def test_export_names_what_servers_leave_out_and_refuses_trained_biases(tmp_path: Path) -> None:
    get_peft_model(bert(), LotrConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path / "head")
    head = [f"base_model.model.classifier.{name}" for name in ("bias", "weight")]
    assert export(tmp_path / "head", tmp_path / "lora")["peft_only"] == head
    get_peft_model(bert(), LotrConfig(r=2, bias="lotr_only")).save_pretrained(tmp_path / "biases")
    with pytest.raises(CheckpointError, match=r"bias='lotr_only'.*`lotr merge`"):
        export(tmp_path / "biases", tmp_path / "more")
    assert not (tmp_path / "more").exists()
