"""A classifier with transformers' Trainer: plan, train, save, load, and merge."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import lotr  # registers the method with PEFT; needed before an adapter is loaded, too


# A real model: AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2).
# This one has random weights, so that the script needs no download.
def base_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
        )
    )


def rows(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Eight tokens a row; the class says whether the first is larger than 32."""
    ids = torch.randint(3, 64, (n, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row[0] > 32).long()} for row in ids]


config = lotr.LotrConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
print(lotr.plan(base_model(), config))
model = get_peft_model(base_model(), config)

# the cores take a higher rate than the factors, and a new head a higher one still
optimizer = torch.optim.AdamW(lotr.parameter_groups(model))
folder = tempfile.mkdtemp()
arguments = TrainingArguments(
    folder, num_train_epochs=3, per_device_train_batch_size=32, save_strategy="no", report_to="none"
)
trainer = Trainer(model, arguments, train_dataset=rows(1024, seed=1), optimizers=(optimizer, None))
trainer.train()
model.save_pretrained(folder)

test = rows(256, seed=2)
ids, labels = (torch.stack([row[key] for row in test]) for key in ("input_ids", "labels"))
with torch.no_grad():
    loaded = PeftModel.from_pretrained(base_model(), folder).eval()
    logits = loaded(ids).logits
    merged = loaded.merge_and_unload()(ids).logits
accuracy = (logits.argmax(-1) == labels).float().mean().item()
print(f"accuracy on new rows: {accuracy:.2f}")
