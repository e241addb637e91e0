"""Writes rope.json: needs torch and transformers 5.23.0."""

import json
import pathlib

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CASES = [
    (dict(rope_type="default"), 64, 10000.0, 128, 24),
    (dict(rope_type="default"), 8, 500000.0, 128, 24),
    (dict(rope_type="linear", factor=4.0), 64, 10000.0, 128, 24),
    (dict(rope_type="dynamic", factor=2.0), 64, 10000.0, 128, 24),
    (dict(rope_type="dynamic", factor=2.0), 64, 10000.0, 128, 300),
    (dict(rope_type="dynamic", factor=8.0), 16, 500000.0, 64, 65),
    (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=32), 8, 500000.0, 128, 24),
    (dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=8192), 64, 500000.0, 131072, 24),
    (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 64, 10000.0, 128, 24),
    (dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=4096), 128, 10000.0, 65536, 24),
    (dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=32,
          beta_slow=1, mscale=0.707, mscale_all_dim=1.0), 64, 10000.0, 163840, 24),
    (dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64, truncate=False,
          attention_factor=1.25), 64, 10000.0, 128, 24),
]

rows = []
for rope, head_dim, theta, positions, seq in CASES:
    settings = dict(head_dim=head_dim, max_position_embeddings=positions)
    rope = dict(rope, rope_theta=theta)
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=dict(rope), **settings)
    if rope["rope_type"] == "default":
        inv_freq, magnitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=seq)
    rows.append(dict(config=dict(settings, rope_parameters=rope), seq=seq,
                     inv_freq=[float(f) for f in inv_freq], magnitude=float(magnitude)))
pathlib.Path(__file__).with_name("rope.json").write_text(json.dumps(rows, indent=1) + "\n")
