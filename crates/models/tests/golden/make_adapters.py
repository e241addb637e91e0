"""Makes `lora_llama_dora`, over `llama_gqa`, and `lora_llama_bias`, over its own base: PEFT 0.21.2,
torch 2.15.0, transformers 5.23.0, on a CPU.

python make_adapters.py
"""

import pathlib

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

here = pathlib.Path(__file__).parent
torch.set_num_threads(1)


def make(name, base, base_name, vocab, config):
    out = here / name
    model = get_peft_model(base, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.05 * torch.randn_like(parameter)
        elif "magnitude" in parameter_name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
        elif "bias" in parameter_name and parameter.requires_grad:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink()

    ids = torch.randint(3, vocab, (2, 16))
    tensors = {"input_ids": ids}
    model.eval()
    with torch.no_grad():
        tensors["logits"] = model(ids).logits
    loss = model(ids, labels=ids).loss
    tensors["loss"] = loss.detach()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter_name, parameter in trained.items():
        tensors["grad." + parameter_name] = parameter.grad.clone()
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


torch.manual_seed(11)
base = AutoModelForCausalLM.from_pretrained(here / "llama_gqa", dtype=torch.float32)
dora = LoraConfig(
    r=4,
    lora_alpha=8,
    use_dora=True,
    target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 6},
    alpha_pattern={"layers.0.*.q_proj": 3},
    task_type="CAUSAL_LM",
)
make("lora_llama_dora", base, "llama_gqa", 256, dora)

torch.manual_seed(12)
config = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    max_position_embeddings=64,
)
base = LlamaForCausalLM(config)
for parameter_name, parameter in base.named_parameters():
    if "norm" not in parameter_name:
        parameter.data = 0.1 * torch.randn_like(parameter)
base.save_pretrained(here / "lora_llama_bias" / "base")
bias = LoraConfig(
    r=2,
    lora_alpha=4,
    bias="lora_only",
    target_modules=["q_proj", "o_proj", "up_proj"],
    task_type="CAUSAL_LM",
)
make("lora_llama_bias", base, "base", 40, bias)
