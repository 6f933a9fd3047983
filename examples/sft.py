"""A small decoder learns a sentence with TRL's supervised fine-tuning, and writes it."""

import tempfile

import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lotr

# Real ones: AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B") and AutoModelForCausalLM.from_pretrained(...).
# These know twelve words and have random weights, so that the script needs no download.
SENTENCE = "shared factors are wide and every layer keeps a small core"
vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", *SENTENCE.split()])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        pad_token_id=0,
        eos_token_id=1,
    )
)
model = get_peft_model(base, lotr.LotrConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW(lotr.parameter_groups(model))
arguments = SFTConfig(
    tempfile.mkdtemp(),
    max_steps=120,
    per_device_train_batch_size=4,
    gradient_checkpointing=False,
    bf16=torch.cuda.is_available(),
    save_strategy="no",
    report_to="none",
)
trainer = SFTTrainer(
    model,
    args=arguments,
    train_dataset=Dataset.from_dict({"text": [SENTENCE] * 16}),
    processing_class=tokenizer,
    optimizers=(optimizer, None),
)
trainer.train()

prompt = tokenizer("shared factors", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=len(vocabulary), do_sample=False)
text = tokenizer.decode(answer[0], skip_special_tokens=True)
print(text)
