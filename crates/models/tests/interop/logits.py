"""Whether transformers computes the logits that this workspace computed.

    logits.py DIR...

Beside each directory is `DIR.probe.safetensors`: bytes of a `text`, the tokens of it as rows of
`input_ids`, their `logits`, and the tokens that end a text, `stop`. A directory is loaded as it
stands, but for GPTQ's packed layers, which are unpacked here, by their definition. Prints the
largest difference of each, and fails if one is above the tolerance.
Needs torch, transformers and safetensors; bitsandbytes and accelerate for its directories.
"""

import os

# Before transformers is imported: nothing is fetched, and processors differ less than GPUs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import importlib.util
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    logging,
)

# Both compute in f32 with the same weights, and differ in the order of their sums alone: by some
# 1e-6 where logits are about 1. A weight, a bias or a frequency that is off is far above.
TOLERANCE = 1e-4

# The implementation that has soft caps of scores.
EAGER = "eager"

# AutoTokenizer makes the tokenizers of these anew as BPE, whatever the files say; the one here is of words.
REMADE = ["qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neo", "gptj", "olmo2"]


def unpack(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The codes in words of 32 bits, lowest first, along an axis."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.long().movedim(axis, 0)[:, None] >> shifts[:, None]) & ((1 << bits) - 1)
    return codes.flatten(0, 1).movedim(0, axis)


def bits_of(layer: str, rules: dict[str, dict], bits: int) -> int:
    """The width of a packed layer, by the first of GPTQModel's rules that matches its path."""
    for rule, settings in rules.items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), layer):
            assert not rule.startswith("-:"), f"{layer} is left out"
            bits = settings.get("bits", bits)
            break
    assert 32 % bits == 0, "3-bit codes cross words"
    return bits


def from_gptq(directory: Path) -> PreTrainedModel:
    """A dense model of the weights in a GPTQ directory, which transformers has no reader for."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    quantization = config.quantization_config
    del config.quantization_config
    rules = quantization.get("dynamic", {})
    stored_less = {"gptq": 1, "gptq_v2": 0}[quantization["checkpoint_format"]]
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    state = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            bits = bits_of(layer, rules, quantization["bits"])
            group = tensors[f"{layer}.g_idx"].long()
            zeros = unpack(tensors[f"{layer}.qzeros"], bits, 1) + stored_less
            scales = tensors[f"{layer}.scales"].float()
            weight = (unpack(tensor, bits, 0) - zeros[group]) * scales[group]
            state[f"{layer}.weight"] = weight.T
        elif part not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=EAGER)
    found = model.load_state_dict(state, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert found.missing_keys == tied and not found.unexpected_keys, found
    return model


def dequantize(model: PreTrainedModel) -> int:
    """Puts the weights that bitsandbytes dequantizes in the place of its packed layers, whose
    products on a processor are less exact. Says how many there were."""
    import bitsandbytes as bnb

    packed = [name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    for name in packed:
        layer = model.get_submodule(name)
        state = layer.weight.quant_state
        weight = bnb.functional.dequantize_4bit(layer.weight.data, state).float()
        linear = torch.nn.Linear(*weight.T.shape, bias=layer.bias is not None)
        linear.weight.data = weight
        if layer.bias is not None:
            linear.bias.data = layer.bias.data.float()
        model.set_submodule(name, linear)
    return len(packed)


def load(directory: Path, method: str | None) -> PreTrainedModel:
    if method == "gptq":
        return from_gptq(directory)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto",
        attn_implementation=EAGER,
        local_files_only=True,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    tensors = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    if method == "bitsandbytes":
        n_packed = dequantize(model)
        n_states = sum(".quant_state.bitsandbytes__" in name for name in tensors)
        assert n_packed == n_states > 0, f"{n_packed} packed layers of {n_states}"
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        return model
    in_file = {tensor.dtype for tensor in tensors.values()}
    assert in_file == {model.dtype}, f"{in_file} are stated to be {model.dtype}"
    return model.float()


def check_tokenizer(directory: Path, model_type: str, text: str, tokens: list[int]) -> None:
    readers = [PreTrainedTokenizerFast]
    if model_type not in REMADE:
        readers.append(AutoTokenizer)
    for reader in readers:
        tokenizer = reader.from_pretrained(directory, local_files_only=True)
        found = tokenizer(text, add_special_tokens=False).input_ids
        assert found == tokens, f"{reader.__name__}: {found}, not {tokens}"


def difference(directory: Path) -> float | None:
    """The largest difference of the logits; none if nothing here reads the directory."""
    config = json.loads((directory / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    needs = ["bitsandbytes", "accelerate"] if method == "bitsandbytes" else []
    if not all(importlib.util.find_spec(name) for name in needs):
        return None
    probe = load_file(f"{directory}.probe.safetensors")
    ids = probe["input_ids"].long()
    text = bytes(probe["text"].tolist()).decode()
    check_tokenizer(directory, config["model_type"], text, ids.flatten().tolist())
    stop = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    assert stop == probe["stop"].tolist(), f"texts end at {stop}"
    model = load(directory, method).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32 and logits.shape == probe["logits"].shape
    return (logits - probe["logits"]).abs().max().item()


def main() -> None:
    logging.disable_progress_bar()
    n_above = 0
    for directory in map(Path, sys.argv[1:]):
        print(directory.name, end=": ", flush=True)
        found = difference(directory)
        if found is None:
            print("skipped: no bitsandbytes and accelerate")
        elif found <= TOLERANCE:
            print(f"{found:.1e}")
        else:  # NaN too.
            print(f"{found:.1e}, above {TOLERANCE}")
            n_above += 1
    sys.exit(n_above > 0)


if __name__ == "__main__":
    main()
