"""Adds `half.safetensors` to `llama_bf16` and `opt_125m_style`: the logits of `input_ids` of their
`reference.safetensors` that transformers 5.23.0 computes in bf16 and in f16 (torch 2.15.0, on a CPU,
eager attention), with the weights rounded to that type.

python make_half_logits.py
"""

import pathlib

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

here = pathlib.Path(__file__).parent
torch.set_num_threads(1)

for name in ["llama_bf16", "opt_125m_style"]:
    ids = load_file(here / name / "reference.safetensors")["input_ids"]
    tensors = {}
    for dtype, short in [(torch.bfloat16, "bf16"), (torch.float16, "f16")]:
        model = AutoModelForCausalLM.from_pretrained(
            here / name, dtype=dtype, attn_implementation="eager"
        )
        model.eval()
        with torch.no_grad():
            logits = model(ids).logits
        assert logits.dtype == dtype
        tensors[f"logits_{short}"] = logits.contiguous()
    save_file(tensors, here / name / "half.safetensors")
    print(name, {key: (value.shape, value.float().std()) for key, value in tensors.items()})
