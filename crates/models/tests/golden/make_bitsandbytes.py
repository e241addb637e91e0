"""A directory that transformers and bitsandbytes write with a packed head and bytes stored as bf16.

    make_bitsandbytes.py

Writes `llama_nf4_head`: a LLaMA of random weights, and in `reference.safetensors` the logits of its
weights as bitsandbytes dequantizes them. Needs torch, transformers, accelerate and bitsandbytes.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tempfile
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def main() -> None:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
        # A list, with which transformers packs the head, too.
        llm_int8_skip_modules=[],
    )
    out = Path(__file__).parent / "llama_nf4_head"
    with tempfile.TemporaryDirectory() as dense:
        LlamaForCausalLM(config).save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=quantization, dtype=torch.float32
        )
    model.save_pretrained(out)
    (out / "generation_config.json").unlink()
    plain = LlamaForCausalLM(config).eval()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            data, of = module.weight.data, module.weight.quant_state
            state[f"{name}.weight"] = bnb.functional.dequantize_4bit(data, of).float()
    for name, parameter in model.named_parameters():
        state.setdefault(name, parameter.data.float())
    plain.load_state_dict(state)
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        logits = plain(input_ids=ids).logits
    save_file({"input_ids": ids, "logits": logits}, out / "reference.safetensors")


if __name__ == "__main__":
    main()
