"""Copies from the reference outputs of PEFT 0.18.1's `loftq_init` what the test needs.

    python make_copy.py REFERENCE_DIR

REFERENCE_DIR has `init.json` and `init.safetensors`: a weight `[96, 128]`, and what LoftQ makes of it at
rank 8, blocks of 64, after 1, 2 and 5 rounds, at 4 and 2 bits.
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

source, target = Path(sys.argv[1]), Path(__file__).parent
tensors = load_file(source / "init.safetensors")
keep = {name: values for name, values in tensors.items() if "lora" in name or name == "weight"}
keep |= {name: tensors[name] for name in ["b2_r8_t1.q", "b4_r8_t1.q"]}
save_file(keep, target / "peft.safetensors")
errors = json.loads((source / "init.json").read_text())
(target / "peft.json").write_text(json.dumps(errors, indent=1) + "\n")
