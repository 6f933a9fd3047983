"""An image classifier in a loop of your own: FacT's row for vision transformers, then a plain LoRA of it."""

import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import lotr


# A real model: AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=2).
# This one has random weights, so that the script needs no download.
def base_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            image_size=32,
            patch_size=8,
        )
    ).eval()


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that is a little red or a little green; the class says which."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (n,), generator=generator)
    pixels[range(n), labels] += 1
    return pixels, labels


head = ["classifier"]
config = lotr.LotrConfig(
    method="fact_tt", r=8, target_modules="all-linear", exclude_modules=head, modules_to_save=head
)
model = get_peft_model(base_model(), config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW(lotr.parameter_groups(model))
pixels, labels = images(512, seed=1)
for step in range(40):
    rows = slice(step * 32 % 512, step * 32 % 512 + 32)
    model(pixels[rows], labels=labels[rows]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

folder = tempfile.mkdtemp()
model.save_pretrained(f"{folder}/lotr")
lotr.export(f"{folder}/lotr", f"{folder}/lora")  # exact; whoever reads it needs PEFT alone
pixels, labels = images(256, seed=2)
with torch.no_grad():
    ours = model.eval()(pixels).logits
    lora = PeftModel.from_pretrained(base_model(), f"{folder}/lora")(pixels).logits
accuracy = (ours.argmax(-1) == labels).float().mean().item()
print(f"accuracy on new images: {accuracy:.2f}")
