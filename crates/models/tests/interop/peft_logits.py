"""Whether PEFT computes the logits that this workspace computed.

    peft_logits.py IDS DIR...

IDS is a safetensors file with `input_ids`. A DIR has a `base`, an `adapter` of PEFT over it, and the
logits of both in `expected.json`. Prints the largest difference of each, and fails if one is above the
tolerance. Needs torch, transformers and peft.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
# Keys that are missing, or match nothing.
warnings.simplefilter("error", UserWarning)
warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")

ids = load_file(sys.argv[1])["input_ids"]
n_above = 0
for place in map(Path, sys.argv[2:]):
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, place / "adapter").eval()
    expected = torch.tensor(json.loads((place / "expected.json").read_text()))
    with torch.no_grad():
        found = (model(ids).logits.flatten() - expected).abs().max().item()
    print(f"{place.name}: {found:.1e}")
    n_above += not found <= TOLERANCE
sys.exit(n_above > 0)
