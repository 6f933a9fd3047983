"""Training with the Trainers of transformers and TRL, under autocast, compiled, and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor

from conftest import VOCABULARY, bert, llama, tokens
from lotr import LotrConfig

# a model that some library casts warns about its own types, not about ours
pytestmark = pytest.mark.filterwarnings("default::UserWarning", "default::RuntimeWarning")


def adapted(**kwargs: Any) -> PeftModel:
    defaults = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "seed": 0}
    return get_peft_model(bert(), LotrConfig(**(defaults | kwargs)))


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _trainer(folder: Path, **kwargs: Any) -> tf.Trainer:
    rows = [{"input_ids": row, "labels": n % 3} for n, row in enumerate(tokens(8))]
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    model = adapted(dropout=0.1)
    return tf.Trainer(model, tf.TrainingArguments(**(settings | kwargs)), train_dataset=rows)


def test_a_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _trainer(tmp_path)
    start = trained(whole.model)
    whole.train()
    resumed = _trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    end, again = trained(whole.model), trained(resumed.model)
    assert end.keys() == again.keys() == start.keys()
    for name in end:
        assert torch.equal(end[name], again[name]), name
        assert not torch.equal(end[name], start[name]), name


def test_the_trainer_lowers_the_loss_leaves_the_base_and_holds_every_shared_number_once(
    tmp_path: Path,
) -> None:
    trainer = _trainer(tmp_path, max_steps=40, save_strategy="no")
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(optimised) == len({id(p) for p in optimised})
    assert sum(p.numel() for p in optimised) == trainer.model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_on_a_half_precision_base_trains_in_full_precision_when_cast(autocast: bool) -> None:
    config = LotrConfig(r=4, target_modules=["query"], init_weights=False)
    model = get_peft_model(bert().bfloat16(), config, autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    logits = model(input_ids=tokens()).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- TRL


def _tokenizer() -> tf.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{n}" for n in range(VOCABULARY - 4)]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _moved(before: dict[str, Tensor], model: torch.nn.Module) -> set[str]:
    after = trained(model)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_sft_of_trl_trains_the_adapter(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    trainer = trl.SFTTrainer(
        llama(),
        args=trl.SFTConfig(**_settings(tmp_path)),
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7"] * 4}),
        processing_class=_tokenizer(),
        peft_config=LotrConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    before = trained(trainer.model)
    assert before and all("lotr_" in name for name in before)
    trainer.train()
    assert _moved(before, trainer.model) == set(before)


def test_dpo_of_trl_trains_against_a_reference_adapter(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    config = LotrConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(llama(), config)
    rows = {"prompt": ["w1 w2"] * 4, "chosen": ["w3 w4"] * 4, "rejected": ["w5 w6 w7"] * 4}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**_settings(tmp_path)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=_tokenizer(),
    )
    reference = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    before = trained(trainer.model)
    assert reference and len(reference) == len(before)
    for name, tensor in reference.items():
        assert torch.equal(tensor, before[name.replace(".ref.", ".default.")])
    trainer.train()
    assert _moved(before, trainer.model) == set(before)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in reference.items())
