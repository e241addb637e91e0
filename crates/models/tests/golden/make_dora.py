"""Makes `lora_llama_dora` over `llama_gqa`: PEFT 0.21.2, torch 2.15.0, transformers 5.23.0, on a CPU.

python make_dora.py
"""

import pathlib

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

here = pathlib.Path(__file__).parent
out = here / "lora_llama_dora"
torch.manual_seed(11)
torch.set_num_threads(1)

base = AutoModelForCausalLM.from_pretrained(here / "llama_gqa", dtype=torch.float32)
config = LoraConfig(
    r=4,
    lora_alpha=8,
    use_dora=True,
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 6},
    alpha_pattern={"layers.0.*.q_proj": 3},
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        parameter.data = 0.05 * torch.randn_like(parameter)
    elif "magnitude" in name:
        parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
model.peft_config["default"].base_model_name_or_path = "llama_gqa"
model.save_pretrained(out, save_embedding_layers=False)
(out / "README.md").unlink()

ids = torch.randint(3, 256, (2, 16))
tensors = {"input_ids": ids}
model.eval()
with torch.no_grad():
    tensors["logits"] = model(ids).logits
loss = model(ids, labels=ids).loss
tensors["loss"] = loss.detach()
loss.backward()
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
for name, parameter in trained.items():
    tensors["grad." + name] = parameter.grad.clone()
optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.01)
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())
tensors["train_losses"] = torch.stack(losses)
with torch.no_grad():
    tensors["after5_logits"] = model(ids).logits
    merged = model.merge_and_unload()
    tensors["after5_merged_logits"] = merged(ids).logits
tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
save_file(tensors, out / "reference.safetensors", {"format": "pt"})
