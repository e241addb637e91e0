"""Makes `peft`: directories of PEFT 0.21.2 over tiny bases, with the logits of PEFT when it loads them.

python make_peft.py [CASE...]
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import pathlib
import shutil
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, logging

out = pathlib.Path(__file__).parent / "peft"
torch.set_num_threads(1)
warnings.simplefilter("ignore")
logging.disable_progress_bar()
VOCAB = 16
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def llama(tied):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=32, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        )
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=8, ffn_dim=12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
            word_embed_proj_dim=4, do_layer_norm_before=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )


BASES = {"llama": lambda: llama(False), "llama_tied": lambda: llama(True), "opt": opt}
QV = ["q_proj", "v_proj"]
# The base, the settings, and whether modules that are saved in full keep their values.
CASES = {
    "look_ahead": ("llama", dict(target_modules=r"^(?!.*(?:vision|lm_head)).*\.(?:q_proj|v_proj|down_proj)$")),
    "look_behind": ("llama", dict(target_modules=r".*(?<!layers\.0\.self_attn)\.(?:q|k)_proj")),
    # In another order, other keys would be the first to match.
    "patterns": (
        "llama",
        dict(
            target_modules=QV + ["down_proj"], rank_pattern={"v_proj": 3, "layers.1.*": 1, "^model.layers.0.self_attn.q_proj": 4},
            alpha_pattern={"layers.1.*": 2, "down_proj": 5, "(?!.*mlp).*layers.0.*": 7}, use_rslora=True,
        ),
    ),
    "all_linear": ("llama", dict(target_modules="all-linear", exclude_modules=["k_proj"])),
    "layers": ("llama", dict(target_modules=QV, layers_to_transform=[1], layers_pattern="layers")),
    "saved": ("llama", dict(target_modules=QV, modules_to_save=["lm_head", "embed_tokens"])),
    "saved_unchanged": ("llama", dict(target_modules=QV, modules_to_save=["lm_head", "embed_tokens"])),
    "saved_norms": ("llama", dict(target_modules=QV, modules_to_save=["embed_tokens", "norm"])),
    "saved_layers": ("llama", dict(target_modules=QV, modules_to_save=["layers.1.mlp"])),
    "lora_ends": ("llama", dict(target_modules=["q_proj", "lm_head", "embed_tokens"], rank_pattern={"embed_tokens": 3})),
    "dora_head": ("llama", dict(target_modules=["q_proj", "lm_head"], use_dora=True)),
    "tokens": ("llama", dict(target_modules=QV, trainable_token_indices=[1, 5])),
    "tied_saved_embedding": ("llama_tied", dict(target_modules=QV, modules_to_save=["embed_tokens"])),
    "tied_saved_head": ("llama_tied", dict(target_modules=QV, modules_to_save=["lm_head"])),
    "tied_saved": ("llama_tied", dict(target_modules=QV, modules_to_save=["lm_head", "embed_tokens"])),
    "tied_ensured": ("llama_tied", dict(target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied_lora_embedding": ("llama_tied", dict(target_modules=["q_proj", "embed_tokens"])),
    "tied_lora_head": ("llama_tied", dict(target_modules=["q_proj", "lm_head"])),
    "tied_lora_ensured": ("llama_tied", dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "tied_tokens": ("llama_tied", dict(target_modules=QV, trainable_token_indices={"embed_tokens": [5, 1]})),
    "opt_all_linear": ("opt", dict(target_modules="all-linear")),
    "opt_bias_all": ("opt", dict(target_modules=QV, bias="all")),
    "opt_bias_lora_only": ("opt", dict(target_modules=QV + ["fc1"], bias="lora_only")),
}


def fresh(base):
    return AutoModelForCausalLM.from_pretrained(out / base, dtype=torch.float32).eval()


def make(name):
    base, settings = CASES[name]
    torch.manual_seed(sum(name.encode()))
    model = get_peft_model(fresh(base), LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **settings}))
    for parameter_name, parameter in model.named_parameters():
        is_saved = ".modules_to_save." in parameter_name
        if not parameter.requires_grad or (is_saved and name == "saved_unchanged"):
            continue
        scale = 0.05 if "lora_A" in parameter_name else 0.3
        # In place: tied factors share their values.
        parameter.data += scale * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(out / name, save_embedding_layers="auto")
    (out / name / "README.md").unlink()
    # PEFT sorts the keys, of which the first to match counts.
    config = json.loads((out / name / "adapter_config.json").read_text())
    config |= {key: value for key, value in settings.items() if key.endswith("_pattern")}
    (out / name / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    loaded = PeftModel.from_pretrained(fresh(base), out / name).eval()
    with torch.no_grad():
        trained, logits, plain = model.eval()(IDS).logits, loaded(IDS).logits, fresh(base)(IDS).logits
    print(f"{name}: {(logits - plain).abs().max():.2f} from the base, {(trained - logits).abs().max():.1e} when loaded")
    print("   ", *sorted(set(load_file(out / name / "adapter_model.safetensors"))), sep=" ")
    return logits


chosen = sys.argv[1:]
if not chosen:
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(7)
    for name, base in BASES.items():
        model = base()
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
references = {"input_ids": IDS} if not chosen else load_file(out / "logits.safetensors")
for name in chosen or CASES:
    references[name] = make(name).contiguous()
save_file(references, out / "logits.safetensors", {"format": "pt"})
