#!/usr/bin/env bash
# Quantizes a model from files to files, kills the process at random moments, and goes on each time; then
# checks that every file has the SHA-256 of a run that nothing disturbed. Needs Linux.
#
#   tools/kill-stream.sh [N [DIR]]   N kills, by default 10, of a model in DIR, by default a random one
set -euo pipefail
cd "$(dirname "$0")/.."

n="${1:-10}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
build=(--release --workspace --features wgpu)
cargo build "${build[@]}" --example quantize --example random_checkpoint
target="${CARGO_TARGET_DIR:-target}/release/examples"
model="${2:-$work/model}"
if [[ ! -d "$model" ]]; then
    "$target/random_checkpoint" small "$model"
fi
# Words of the random model, which others read as text.
seq 0 4000 | awk '{ printf "w%d ", $1 * $1 % 997 }' >"$work/text"
# A command, not a function: what is killed is the program.
quantize=("$target/quantize" --model "$model" --device flex --calibration "$work/text" --seq-len 64
    --samples 16 --quantizer optq --bits 4 --group-size 32 --resume)

began=$(date +%s%N)
"${quantize[@]}" --out "$work/whole" >/dev/null
took=$((($(date +%s%N) - began) / 1000000))
kills=0
while ((kills < n)); do
    "${quantize[@]}" --out "$work/out" >/dev/null 2>&1 &
    # From a tenth to all of the time of a whole run, in milliseconds.
    after=$((took / 10 + RANDOM * took / 32768))
    sleep "$(printf '%d.%03d' $((after / 1000)) $((after % 1000)))"
    if kill -KILL $! 2>/dev/null; then
        kills=$((kills + 1))
    fi
    wait $! 2>/dev/null || true
    if [[ -d "$work/out" ]]; then
        diff -r "$work/whole" "$work/out"
        rm -r "$work/out"
    fi
done
if [[ ! -d "$work/out" ]]; then
    "${quantize[@]}" --out "$work/out" >/dev/null
fi
(cd "$work/out" && sha256sum --check --quiet SHA256SUMS)
diff -r "$work/whole" "$work/out"
echo "$kills kills; the files are those of a run that nothing disturbed ($took ms)"
