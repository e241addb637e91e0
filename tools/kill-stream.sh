#!/usr/bin/env bash
# Quantizes and initializes a model from files to files, kills the process at random moments, and goes on each
# time; then checks that every file has the SHA-256 of a run that nothing disturbed. Needs Linux.
#
#   tools/kill-stream.sh [N [DIR]]   N kills, by default 10, of a model in DIR, by default a random one
set -euo pipefail
cd "$(dirname "$0")/.."

n="${1:-10}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
build=(--release --workspace --features wgpu)
cargo build "${build[@]}" --example quantize --example loftq_init --example random_checkpoint
target="${CARGO_TARGET_DIR:-target}/release/examples"
model="${2:-$work/model}"
if [[ ! -d "$model" ]]; then
    "$target/random_checkpoint" small "$model"
fi
# Words of the random model, which others read as text.
seq 0 4000 | awk '{ printf "w%d ", $1 * $1 % 997 }' >"$work/text"

# Kills a program of these options N times, which writes a directory, and compares.
killed() {
    # A command, not a function: what is killed is the program.
    local command=("$@" --model "$model" --device flex --seq-len 64 --samples 16 --bits 4
        --group-size 32 --resume)
    # The report of an initialization has the times and the command.
    local compare=(diff -r -x report.json "$work/whole" "$work/out")
    local began took kills=0 after
    rm -rf "$work/whole" "$work/out"
    began=$(date +%s%N)
    "${command[@]}" --out "$work/whole" >/dev/null
    took=$((($(date +%s%N) - began) / 1000000))
    while ((kills < n)); do
        "${command[@]}" --out "$work/out" >/dev/null 2>&1 &
        # From a tenth to all of the time of a whole run, in milliseconds.
        after=$((took / 10 + RANDOM * took / 32768))
        sleep "$(printf '%d.%03d' $((after / 1000)) $((after % 1000)))"
        if kill -KILL $! 2>/dev/null; then
            kills=$((kills + 1))
        fi
        wait $! 2>/dev/null || true
        if [[ -d "$work/out" ]]; then
            "${compare[@]}"
            rm -r "$work/out"
        fi
    done
    if [[ ! -d "$work/out" ]]; then
        "${command[@]}" --out "$work/out" >/dev/null
    fi
    find "$work/out" -name SHA256SUMS -execdir sha256sum --check --quiet {} +
    "${compare[@]}"
    echo "$(basename "$1"): $kills kills; the files are those of a run that nothing disturbed ($took ms)"
}

killed "$target/quantize" --calibration "$work/text" --quantizer optq
killed "$target/loftq_init" --train "$work/text" --method qera --rank 8 --steps 0
