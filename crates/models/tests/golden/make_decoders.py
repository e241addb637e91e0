"""Makes the directories of `decoders`: small models on seeded random weights, with the logits, losses,
gradients and continuations that transformers 5.24.0 computes (torch 2.15.0, on a CPU, eager attention,
f32).

python make_decoders.py [NAME...]
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

here = pathlib.Path(__file__).parent / "decoders"
torch.set_num_threads(1)

LLAMA = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GEMMA = dict(LLAMA, sliding_window=5, query_pre_attn_scalar=12)
PHI = {key: value for key, value in LLAMA.items() if key != "head_dim"} | dict(hidden_size=32)
FACTORS = dict(short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.5, 6.0])
GPT = dict(
    vocab_size=48,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
NEO = dict(GPT, hidden_size=16, num_heads=2, max_position_embeddings=64)
J = dict(GPT, n_embd=32, n_layer=2, n_head=2, n_positions=64, n_inner=40)

CASES = {
    "llama3": ("llama", dict(LLAMA, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_gelu": ("llama", dict(LLAMA, hidden_act="gelu", mlp_bias=True, attention_bias=True)),
    "mistral_window": ("mistral", dict(LLAMA, sliding_window=5)),
    "mistral_long_window": ("mistral", dict(LLAMA, sliding_window=40)),
    "qwen2_windows": (
        "qwen2",
        dict(LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=2),
    ),
    "smollm3": ("smollm3", dict(LLAMA, no_rope_layer_interval=2)),
    "smollm3_windows": (
        "smollm3",
        dict(
            LLAMA,
            no_rope_layers=[1, 0, 0, 1],
            use_sliding_window=True,
            sliding_window=4,
            attention_bias=True,
        ),
    ),
    "qwen3": ("qwen3", dict(LLAMA, tie_word_embeddings=True)),
    "qwen3_windows": (
        "qwen3",
        dict(
            LLAMA,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "gemma2": ("gemma2", dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma2_bias": (
        "gemma2",
        dict(
            GEMMA,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
    ),
    "gemma3": ("gemma3_text", dict(GEMMA, sliding_window_pattern=3)),
    "gemma3_scaled": (
        "gemma3_text",
        dict(
            GEMMA,
            final_logit_softcapping=3.0,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
    "phi3": ("phi3", dict(PHI, sliding_window=6)),
    "phi3_long": (
        "phi3",
        dict(
            PHI,
            original_max_position_embeddings=56,
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
            rope_scaling=dict(type="longrope", **FACTORS),
        ),
    ),
    "phi3_longer": (
        "phi3",
        dict(
            PHI,
            original_max_position_embeddings=16,
            partial_rotary_factor=0.75,
            rope_scaling=dict(type="longrope", **FACTORS),
        ),
    ),
    "gpt_neo": (
        "gpt_neo",
        dict(NEO, num_layers=4, attention_types=[[["global", "local"], 2]], window_size=4),
    ),
    "gptj": ("gptj", dict(J, rotary_dim=6)),
    "gptj_whole": ("gptj", dict(J, rotary_dim=16, activation_function="relu")),
    "olmo2": ("olmo2", dict(LLAMA)),
}


def randomize(model, seed):
    """Weights that make scores and logits of a few units, and no parameter a round number."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                # Small embeddings, or a tied head would say the last token again.
                scale = 0.3 if parameter is model.get_input_embeddings().weight else 1.2
                parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)


def logits_of(model, ids, mask=None):
    if mask is None:
        return model(ids).logits
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions).logits


def make(name, model_type, settings, seed):
    config = AutoConfig.for_model(model_type, **settings)
    config._attn_implementation = "eager"
    config.use_cache = True
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(model, seed)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, 48, (2, 24), generator=generator)
    tensors = {"input_ids": ids}

    loss = model(ids, labels=ids).loss
    loss.backward()
    tensors["loss"] = loss.detach()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for parameter_name, parameter in model.named_parameters():
        block = parameter_name.split(".")
        in_later_block = any(part.isdigit() and int(part) > 1 for part in block)
        if parameter.grad is None or in_later_block:
            continue
        if tied and parameter is model.get_input_embeddings().weight:
            continue
        tensors[f"grad.{parameter_name}"] = parameter.grad.clone()

    with torch.no_grad():
        tensors["logits"] = logits_of(model, ids)
        for side, start in [("left", slice(0, 5)), ("right", slice(19, 24))]:
            mask = torch.ones_like(ids)
            mask[1, start] = 0
            tensors[f"{side}_mask"] = mask
            tensors[f"{side}_logits"] = logits_of(model, ids, mask)
        if name != "phi3_longer":
            tensors["greedy"] = model.generate(
                ids[:1, :8],
                attention_mask=torch.ones_like(ids[:1, :8]),
                do_sample=False,
                max_new_tokens=32,
                pad_token_id=0,
            )
    folder = here / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    save_file(tensors, folder / "reference.safetensors")
    print(name, f"{tensors['logits'].std():.2f}", tensors.get("greedy", ids)[0, 8:20].tolist())


for seed, (name, (model_type, settings)) in enumerate(CASES.items()):
    if not sys.argv[1:] or name in sys.argv[1:]:
        make(name, model_type, settings, seed)
