"""Prints what transformers makes of configurations of each model type, for `tests/golden/config_keys.json`.

python config_keys.py > ../golden/config_keys.json

For each model type: the keys of its configuration class with their defaults, and for each probe, a set of
settings laid over the small configuration of the type, what the loaded model computes with: the kinds of its
layers with their windows, the frequencies and the magnitude of each, and other numbers; or that transformers
refuses it. transformers 5.24.0.
"""

import dataclasses
import json
import logging
import sys

import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

logging.disable(logging.WARNING)

LLAMA = dict(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
NEO = dict(
    vocab_size=16, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
)
J = dict(vocab_size=16, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
OPT = dict(
    vocab_size=16, hidden_size=32, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4
)
BASES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi3": LLAMA,
    "olmo2": LLAMA,
    "gpt_neo": NEO,
    "gptj": J,
    "opt": OPT,
}

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
ABSENT = "(absent)"
ROPES = [
    {},
    {"rope_theta": 500000.0},
    {"rope_theta": 500000},
    {"rope_theta": None},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {}},
    {"rope_scaling": {}},
    {"rope_scaling": None},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": None}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8},
    {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("orig")}},
    {"rope_parameters": dict(LLAMA3, rope_theta=500000.0)},
    {"rope_parameters": dict(LLAMA3, rope_theta=500000.0), "original_max_position_embeddings": 8},
    {"rope_scaling": LLAMA3, "rope_parameters": dict(LLAMA3, rope_theta=500000.0), "rope_theta": 500000.0},
    {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}},
    {"rope_scaling": {"type": "yarn", "factor": 8.0}},
    {"rope_scaling": {"type": "yarn", "factor": 8.0}, "original_max_position_embeddings": 8},
    {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
     "original_max_position_embeddings": 8},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2,
                      "truncate": False}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
    {"partial_rotary_factor": 1.0},
    {"partial_rotary_factor": None},
    {"rope_scaling": {"rope_type": "unheard"}},
]
HEADS = [
    {"num_key_value_heads": None},
    {"num_key_value_heads": ABSENT},
    {"num_key_value_heads": 3},
    {"num_attention_heads": 8},
    {"head_dim": None},
    {"head_dim": 16},
    {"head_dim": ABSENT},
    {"max_position_embeddings": ABSENT},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": None},
    {"tie_word_embeddings": ABSENT},
    {"attention_bias": None},
    {"attention_bias": True},
    {"mlp_bias": None},
    {"mlp_bias": True},
    {"rms_norm_eps": 1e-3},
    {"rms_norm_eps": None},
    {"hidden_act": "gelu"},
    {"hidden_act": "swish"},
    {"hidden_act": "unheard"},
    {"hidden_act": None},
    {"use_cache": None},
    {"pretraining_tp": 2},
    {"pad_token_id": -1},
    {"vocab_size": None},
    {"vocab_size": "16"},
    {"num_hidden_layers": None},
    {"is_causal": True},
]
WINDOWS = [
    {"sliding_window": 8},
    {"sliding_window": None},
    {"sliding_window": 8, "use_sliding_window": True},
    {"sliding_window": 8, "use_sliding_window": False},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 99},
    {"sliding_window": None, "use_sliding_window": True},
    {"use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 8, "use_sliding_window": True,
     "layer_types": ["full_attention", "sliding_attention"] * 2},
    {"layer_types": ["full_attention"] * 4},
    {"layer_types": ["full_attention"] * 3},
    {"layer_types": ["full_attention", "unheard"] * 2},
    {"layer_types": None},
]
OWN = {
    "smollm3": [
        {"no_rope_layers": [1, 0, 1, 1]},
        {"no_rope_layers": None},
        {"no_rope_layer_interval": 2},
        {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 8},
    ],
    "gemma2": [
        {"query_pre_attn_scalar": 144},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"attn_logit_softcapping": 20, "final_logit_softcapping": 10},
        {"hidden_activation": "gelu"},
        {"use_bidirectional_attention": None},
    ],
    "gemma3_text": [
        {"sliding_window_pattern": 2},
        {"_sliding_window_pattern": 2},
        {"rope_local_base_freq": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 500.0},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}, "rope_local_base_freq": 500.0},
        {"final_logit_softcapping": 30.0},
    ],
    "phi3": [
        {"partial_rotary_factor": 0.5},
        {"original_max_position_embeddings": 16,
         "rope_scaling": {"type": "longrope", "short_factor": [1, 1.1, 1.2, 1.3], "long_factor": [2, 3, 4, 5]}},
        {"original_max_position_embeddings": 16,
         "rope_scaling": {"type": "su", "short_factor": [1, 1.1, 1.2, 1.3], "long_factor": [2, 3, 4, 5]}},
        {"original_max_position_embeddings": 16,
         "rope_scaling": {"type": "longrope", "short_factor": [1, 1.1], "long_factor": [2, 3, 4, 5]}},
        {"sliding_window": 8},
    ],
    "gpt_neo": [
        {"intermediate_size": None},
        {"intermediate_size": 20},
        {"attention_types": None, "num_layers": 24},
        {"attention_types": [[["global"], 2]]},
        {"attention_types": [[["global"], 3]]},
        {"attention_types": [[["local"], 1], [["global"], 1]], "window_size": 8},
        {"num_heads": ABSENT, "num_attention_heads": 8},
        {"num_layers": ABSENT, "num_hidden_layers": 2},
        {"layer_norm_epsilon": 1e-3},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
    ],
    "gptj": [
        {"n_inner": None},
        {"n_inner": 20},
        {"rotary_dim": 8},
        {"n_positions": ABSENT, "max_position_embeddings": 16},
        {"n_head": ABSENT, "num_attention_heads": 8},
        {"n_embd": ABSENT, "hidden_size": 16},
        {"layer_norm_epsilon": 1e-3},
        {"activation_function": "gelu_fast"},
    ],
    "opt": [
        {"word_embed_proj_dim": None},
        {"word_embed_proj_dim": 16},
        {"do_layer_norm_before": False},
        {"do_layer_norm_before": None},
        {"_remove_final_layer_norm": True},
        {"enable_bias": False},
        {"enable_bias": None},
        {"layer_norm_elementwise_affine": False},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_new"},
        {"activation_function": "gelu_fast"},
        {"activation_function": "quick_gelu"},
        {"activation_function": "silu"},
        {"activation_function": "relu6"},
        {"activation_function": "unheard"},
        {"tie_word_embeddings": False},
        {"max_position_embeddings": ABSENT},
    ],
}
ROTARY = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "olmo2"]


def probes(model_type):
    all_probes = list(OWN.get(model_type, []))
    if model_type in ROTARY:
        all_probes += ROPES
    if model_type not in ["gpt_neo", "gptj", "opt"]:
        all_probes += HEADS + WINDOWS
    return all_probes


def frequencies(model, layer_type):
    """The frequencies and the magnitude of a text of 32 tokens, as the model's module computes them."""
    rotary = model.model.rotary_emb
    x = torch.zeros(1, 1, 1)
    positions = torch.arange(32)[None]
    arguments = (layer_type,) if isinstance(rotary.rope_type, dict) else ()
    cos, sin = rotary(x, positions, *arguments)
    angle = torch.atan2(sin[0, 1], cos[0, 1])
    half = cos.shape[-1] // 2
    magnitude = float((cos[0, 1] ** 2 + sin[0, 1] ** 2).sqrt()[0])
    return [float(f"{value:.8g}") for value in angle[:half].tolist()], float(f"{magnitude:.7g}")


def meaning(config, model_type):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    ids = torch.arange(12)[None] % 16
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all()
    sizes = [parameter.numel() for parameter in model.parameters()]
    result = {"n_parameters": len(sizes), "n_elements": sum(sizes)}
    if model_type not in ["gpt_neo", "gptj", "opt"]:
        layer_types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if model_type in ["llama", "olmo2"]:
            window = None
        layers = []
        for layer, module in enumerate(model.model.layers):
            kind = layer_types[layer] if layer_types and model_type not in ["llama", "mistral", "phi3", "olmo2"] else None
            has_window = window is not None and kind in [None, "sliding_attention"]
            rotates = bool(getattr(module.self_attn, "use_rope", True))
            frequency, magnitude = frequencies(model, kind)
            found = {"window": window} if has_window else {}
            if rotates:
                found |= {"frequencies": frequency, "magnitude": magnitude}
            layers.append(found)
        # One for all where they are alike.
        result["layers"] = layers[:1] if all(layer == layers[0] for layer in layers) else layers
    return result


def without_class_keys(config_class):
    fields = {}
    for field in dataclasses.fields(config_class):
        if field.name in ["transformers_version", "architectures"]:
            continue
        value = None if field.default is dataclasses.MISSING else field.default
        fields[field.name] = value if not callable(value) else None
    return fields


out = {}
for model_type, base in BASES.items():
    config_class = type(AutoConfig.for_model(model_type))
    keys = without_class_keys(config_class)
    results = []
    for probe in probes(model_type):
        settings = dict(base, **probe)
        settings = {key: value for key, value in settings.items() if value != ABSENT}
        if model_type in ["gemma2", "gemma3_text"] and "head_dim" not in probe:
            settings["head_dim"] = 8
        for token in ["bos_token_id", "eos_token_id", "pad_token_id"]:
            settings.setdefault(token, None)
        try:
            # As a file is read.
            text = json.dumps(dict(settings, model_type=model_type))
            config = config_class.from_dict(json.loads(text))
            found = meaning(config, model_type)
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        for token in ["bos_token_id", "eos_token_id", "pad_token_id"]:
            if settings[token] is None:
                del settings[token]
        results.append({"json": settings, "found": found})
    out[model_type] = {"keys": keys, "probes": results}
    refused = sum("refused" in result["found"] for result in results)
    print(model_type, len(results), "probes,", refused, "refused", file=sys.stderr)
print("{")
for number, (model_type, found) in enumerate(out.items()):
    lines = [json.dumps(probe, separators=(",", ":"), default=str) for probe in found["probes"]]
    keys = json.dumps(found["keys"], separators=(",", ":"), default=str)
    end = "," if number + 1 < len(out) else ""
    print(f'"{model_type}": {{"keys": {keys}, "probes": [\n' + ",\n".join(lines) + f"\n]}}{end}")
print("}")
