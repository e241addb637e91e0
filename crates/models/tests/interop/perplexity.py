"""Perplexity of a quantized directory as other programs read it, in the protocol `gptq`.

    perplexity.py DIR TEXT SEQ_LEN [ADAPTER]

A bitsandbytes directory is loaded by transformers: once with bitsandbytes' own products, once with
the weights that bitsandbytes dequantizes. A GPTQ directory is decoded here, by its definition.
With a directory of adapters, PEFT puts them on the model.
Needs torch, transformers, safetensors and, for the former, bitsandbytes and accelerate.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def perplexity(model, tokens, seq_len):
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses)), len(losses)


def unpack(words, bits, axis):
    words = np.moveaxis(words.numpy().astype(np.uint32), axis, 0)
    codes = [(words >> (bits * k)) & ((1 << bits) - 1) for k in range(32 // bits)]
    return np.moveaxis(np.stack(codes, 1).reshape(-1, words.shape[1]), 0, axis)


def decode_gptq(directory, config):
    quantization = config.pop("quantization_config")
    bits, v1 = quantization["bits"], quantization["checkpoint_format"] == "gptq"
    assert bits in (2, 4, 8), "3-bit codes cross words"
    state = {}
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            zeros = unpack(tensors[f"{layer}.qzeros"], bits, 1).astype(np.float32)
            zeros = (zeros + v1) % (1 << bits) if v1 else zeros
            scales = tensors[f"{layer}.scales"].float().numpy()
            group = tensors[f"{layer}.g_idx"].numpy()
            weight = (unpack(tensor, bits, 0) - zeros[group]) * scales[group]
            state[f"{layer}.weight"] = torch.tensor(weight.T.copy())
        elif not name.endswith((".qzeros", ".scales", ".g_idx")):
            state[name] = tensor.float()
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(state, strict=False)
    return model


def dequantize(model):
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                weight = child.weight
                dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
                linear = torch.nn.Linear(*dense.T.shape, bias=child.bias is not None)
                linear.weight.data = dense
                if child.bias is not None:
                    linear.bias.data = child.bias.data.float()
                setattr(module, name, linear)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def adapted(model, adapter):
    if not adapter:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter[0]).eval()


def main():
    directory, text, seq_len = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    adapter = sys.argv[4:]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    tokens = tokenizer(text.read_text(), return_tensors="pt", add_special_tokens=False)
    tokens = tokens.input_ids[0]
    config = json.loads((directory / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "gptq":
        model = decode_gptq(directory, config)
    else:
        model = load(directory)
    model = adapted(model, adapter)
    print("%.4f over %d windows" % perplexity(model, tokens, seq_len))
    if method == "bitsandbytes":
        # Another one: its products have moved the weights of the first.
        model = load(directory)
        dequantize(model)
        model = adapted(model, adapter)
        print("%.4f with its dequantized weights" % perplexity(model, tokens, seq_len)[0])


main()
