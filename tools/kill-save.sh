#!/usr/bin/env bash
# Saves a small model, killed at each of its system calls, with an error from each of them, and with a
# loss of power after each of them; then checks that nothing is torn and that the next save leaves
# nothing behind. Takes some minutes; needs Linux, strace and Python 3.
#
#   tools/kill-save.sh [DIR]   saves below DIR, by default a temporary directory
set -euo pipefail
cd "$(dirname "$0")/.."

for program in strace python3; do
    if ! command -v "$program" >/dev/null; then
        echo "kill-save.sh needs $program" >&2
        exit 1
    fi
done
build=(--release -p quant-models -p benches --features benches/wgpu --example resave)
program="$(cargo build "${build[@]}" --message-format=json | python3 -c '
import json, sys
found = (json.loads(line) for line in sys.stdin)
print([of["executable"] for of in found
       if of.get("target", {}).get("name") == "resave" and of.get("executable")][-1])')"
exec python3 tools/kill_save.py "$program" crates/models/tests/golden/llama_gptq_w4_g32_sym "${1:-}"
