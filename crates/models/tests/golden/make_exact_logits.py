"""Adds `logits_exact` to the references of the packed checkpoints beside this file: the logits of
transformers' model in f32 with the weights that the files hold, dequantized here as the formats
define them. Run with torch, transformers and safetensors; the names of the directories with the
original references are the arguments."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


def gptq(tensors, path):
    """w = scales (q - 8) by `g_idx`; 4 bits, symmetric."""
    qweight, g_idx = tensors[path + ".qweight"], tensors[path + ".g_idx"].long()
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, qweight.shape[1])
    return ((codes.float() - 8) * tensors[path + ".scales"].float()[g_idx]).T.contiguous()


def bitsandbytes(tensors, path):
    """Blocks of the flattened weight, with double-quantized scales."""
    name = path + ".weight"
    state = json.loads(bytes(tensors[name + ".quant_state.bitsandbytes__nf4"].tolist()))
    packed = tensors[name].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    absmax = tensors[name + ".nested_quant_map"][tensors[name + ".absmax"].long()]
    nested = torch.arange(len(absmax)) // state["nested_blocksize"]
    absmax = absmax * tensors[name + ".nested_absmax"][nested] + state["nested_offset"]
    block = torch.arange(len(codes)) // state["blocksize"]
    return (tensors[name + ".quant_map"][codes] * absmax[block]).reshape(state["shape"])


for original in map(Path, sys.argv[1:]):
    config = json.loads((original / "config.json").read_text())
    method = config.pop("quantization_config")["quant_method"]
    dequantize = {"gptq": gptq, "bitsandbytes": bitsandbytes}[method]
    tensors = load_file(original / "model.safetensors")
    weights = {name: t.float() for name, t in tensors.items() if "_proj." not in name}
    paths = {name.split("_proj.")[0] + "_proj" for name in tensors if "_proj." in name}
    weights |= {path + ".weight": dequantize(tensors, path) for path in sorted(paths)}
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    model.load_state_dict(weights)
    reference = load_file(original / "reference.safetensors")
    kept = {name: reference[name].contiguous() for name in ["input_ids", "logits"]}
    with torch.no_grad():
        kept["logits_exact"] = model(kept["input_ids"]).logits
    save_file(kept, Path(__file__).parent / original.name / "reference.safetensors")
