#!/usr/bin/env bash
# Tunes a model, kills the process at random moments, and goes on each time; then checks that every file has
# the SHA-256 of a run that nothing disturbed, and those with times the same values without them. Needs Linux.
#
#   tools/kill-train.sh [N [OPTION..]]   N kills, by default 10, of `adapt` with these options, by default
#                                        LoRA on the embedded model
set -euo pipefail
cd "$(dirname "$0")/.."

n="${1:-10}"
shift || true
options=("$@")
if ((${#options[@]} == 0)); then
    options=(--bits 4 3 --method lora --steps 60 --batch 4 --seq-len 64 --eval-windows 32 --eval-every 10)
fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
build=(--release --workspace --features wgpu)
cargo build "${build[@]}" --example adapt
# A command, not a function: what is killed is the program.
adapt=("${CARGO_TARGET_DIR:-target}/release/examples/adapt" --device flex "${options[@]}"
    --checkpoint-every 5 --out "$work/out" --resume)

# The SHA-256 of each file, without what tells how long things took.
sums() {
    cd "$1"
    find . -type f ! -name 'metrics.jsonl' ! -name 'report.json' ! -name 'events.out.tfevents' -print0 |
        sort -z | xargs -0 sha256sum
    find . -name 'metrics.jsonl' -print0 | sort -z | xargs -0 sed -E 's/,"tokens_per_second".*//' | sha256sum
    grep -vE '"(seconds|peak_bytes|resumed_from)"' report.json | sha256sum
    find . -name 'events.out.tfevents' -printf '%p %s\n' | sort
}

began=$(date +%s%N)
"${adapt[@]}" >/dev/null
took=$((($(date +%s%N) - began) / 1000000))
(sums "$work/out") >"$work/whole"
rm -r "$work/out"
kills=0
while ((kills < n)); do
    "${adapt[@]}" >/dev/null 2>&1 &
    # From a tenth to all of the time of a whole run, in milliseconds.
    after=$((took / 10 + RANDOM * took / 32768))
    sleep "$(printf '%d.%03d' $((after / 1000)) $((after % 1000)))"
    if kill -KILL $! 2>/dev/null; then
        kills=$((kills + 1))
    fi
    wait $! 2>/dev/null || true
    if [[ -d "$work/out" ]]; then
        (sums "$work/out") | diff "$work/whole" -
        rm -r "$work/out"
    fi
done
if [[ ! -d "$work/out" ]]; then
    "${adapt[@]}" >/dev/null
fi
(sums "$work/out") | diff "$work/whole" -
if compgen -G "$work/*.partial" >/dev/null; then
    echo "a part of a run is left" >&2
    exit 1
fi
echo "$kills kills; the files are those of a run that nothing disturbed ($took ms)"
