"""Makes `bidirectional`: a block of a Llama whose tokens attend to those before and after them, with the
outputs and gradients that transformers 5.24.0 computes (torch 2.15.0, on a CPU, eager attention, f32) for
masks that are given in full.

python make_bidirectional.py
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

here = pathlib.Path(__file__).parent / "bidirectional"
torch.set_num_threads(1)
torch.manual_seed(20)
BATCH, SEQ = 2, 12

config = AutoConfig.for_model(
    "llama",
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    for norm in [m for n, m in model.named_modules() if "norm" in n]:
        norm.weight += 1.0
model.save_pretrained(here)

input_ids = torch.randint(0, config.vocab_size, (BATCH, SEQ))
# The weights of the outputs in the scalar whose gradients are taken.
weights = torch.randn(BATCH, SEQ, config.hidden_size)
own = torch.arange(SEQ)

# The first token of each token's document. Each token of padding is a document of its own.
CASES = {
    "whole": ([[0] * SEQ] * 2, None),
    "left": ([[0, 1, 2] + [3] * 9, [0, 1, 2, 3, 4] + [5] * 7], None),
    "right": ([[0] * 9 + [9, 10, 11], [0] * 7 + [7, 8, 9, 10, 11]], None),
    "documents": ([[0] * 5 + [5] * 4 + [9] * 3, [0] * 2 + [2] * 10], None),
    "window": ([[0] * SEQ] * 2, 3),
    "window_of_documents": ([[0] * 5 + [5] * 4 + [9] * 3, [0] * 2 + [2] * 10], 3),
}
reference = {"input_ids": input_ids, "weights": weights}
for name, (starts, window) in CASES.items():
    starts = torch.tensor(starts)
    attends = starts[:, :, None] == starts[:, None, :]
    if window is not None:
        attends &= (own[:, None] - own[None, :]).abs() < window
    assert (attends.diagonal(dim1=1, dim2=2)).all() and (attends == attends.mT).all()
    mask = torch.zeros(BATCH, 1, SEQ, SEQ).masked_fill(~attends[:, None], torch.finfo(torch.float32).min)
    model.zero_grad()
    output = model.model(
        input_ids, attention_mask=mask, position_ids=own - starts, use_cache=False
    ).last_hidden_state
    (output * weights).sum().backward()
    reference[f"{name}.starts"] = starts
    reference[f"{name}.output"] = output.detach()
    for parameter, values in model.named_parameters():
        reference[f"{name}.grad.{parameter}"] = values.grad.clone()
    # A token changes outputs before it, and none of other documents.
    changed = input_ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % config.vocab_size
    with torch.no_grad():
        other = model.model(
            changed, attention_mask=mask, position_ids=own - starts, use_cache=False
        ).last_hidden_state
    differs = ((other - output).abs().amax(-1) > 1e-6)[0]
    assert (differs == attends[0, :, 8]).all(), (name, differs)
(here / "generation_config.json").unlink()
save_file({name: t.contiguous() for name, t in reference.items()}, here / "reference.safetensors")
