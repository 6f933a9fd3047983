"""Three tasks on one basis, in one bank, and a batch whose rows belong to different tasks."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import lotr


# A real model: AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2).
# This one has random weights, so that the script needs no download.
def base_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
        )
    ).eval()


def train(task: int, config: lotr.LotrConfig) -> PeftModel:
    """Train for a task: is the token at the place `task` larger than 32?"""
    model = get_peft_model(base_model(), config)
    optimizer = torch.optim.AdamW(lotr.parameter_groups(model))
    for step in range(40):
        ids = torch.randint(3, 64, (32, 8), generator=torch.Generator().manual_seed(step))
        model(ids, labels=(ids[:, task] > 32).long()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


folder = tempfile.mkdtemp()
# the first adapter gives the factors; the others keep them, and train cores and a head alone
train(0, lotr.LotrConfig(r=8, task_type="SEQ_CLS")).save_pretrained(f"{folder}/first")
bank = lotr.CoreBank.create(f"{folder}/bank", basis=f"{folder}/first", dtype="float32")
bank.add_adapter("first", f"{folder}/first")
alone = {}
for task in (1, 2):
    model = train(task, lotr.LotrConfig(basis=f"{folder}/first", task_type="SEQ_CLS"))
    model.save_pretrained(f"{folder}/{task}")
    bank.add_adapter(f"place {task}", f"{folder}/{task}")
    alone[f"place {task}"] = model
print(bank.stats())

names = ["place 1", "place 2", None, "place 1"]  # a task a row; None is the base model
ids = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(99))
served = bank.wrap(base_model())
with torch.no_grad():
    mixed = served(ids, task_ids=names).logits
    one_by_one = torch.cat(
        [
            alone[name](row[None]).logits if name else base_model()(row[None]).logits
            for name, row in zip(names, ids, strict=True)
        ]
    )
print(f"largest difference to each adapter alone: {(mixed - one_by_one).abs().max():.1e}")
