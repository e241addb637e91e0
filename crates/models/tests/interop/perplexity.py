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

import torch
from logits import dequantize, from_gptq
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def perplexity(model, tokens, seq_len):
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    return math.exp(sum(losses) / len(losses)), len(losses)


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
        model = from_gptq(directory).eval()
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


if __name__ == "__main__":
    main()
