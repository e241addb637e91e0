#!/usr/bin/env bash
# Fuzzes the parsers of files, each for some seconds.
#
#   fuzz/run.sh 60                  all targets
#   fuzz/run.sh 60 config index     these targets
#   fuzz/run.sh seeds               writes the seeds
#
# FUZZ_SEED is the seed of the random numbers, which is another one each time if it is not set.
# FUZZ_RUNS is the number of inputs after which a target ends if its seconds have not passed: with a
# seed and no corpus from before, the inputs are then the same on every machine.
# Needs a compiler of C++, for libFuzzer, but no nightly Rust and not cargo-fuzz. Inputs that reach new
# code are kept in `corpus`, those that fail in `artifacts`.
set -euo pipefail
cd "$(dirname "$0")"
seconds="${1:?the seconds of each target, or seeds}"
shift
targets=("$@")
if ((!$#)); then
    targets=(fuzz_targets/*.rs)
    targets=("${targets[@]##*/}")
    targets=("${targets[@]%.rs}")
fi

# The flags are for the code that is fuzzed, and not for build scripts: hence a target.
triple="$(rustc --print host-tuple)"
flags=(--cfg fuzzing -Cpasses=sancov-module)
for pass in level=4 inline-8bit-counters pc-table trace-compares; do
    flags+=("-Cllvm-args=-sanitizer-coverage-$pass")
done
export RUSTFLAGS="${flags[*]}"
if [[ "$seconds" == seeds ]]; then
    exec cargo run --release --locked --example seeds --target "$triple"
fi
cargo build --release --locked --bins --target "$triple"
binaries="${CARGO_TARGET_DIR:-target}/$triple/release"

# The files that inputs become are in memory where that is possible.
TMPDIR="$(mktemp -d -p "$([[ -d /dev/shm ]] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")"
export TMPDIR
# Of models so small that several threads only wait for each other.
export RAYON_NUM_THREADS=1
trap 'rm -r "$TMPDIR"' EXIT

failed=()
for target in "${targets[@]}"; do
    mkdir -p "corpus/$target" artifacts
    log="$TMPDIR/log"
    is_fine=1
    "$binaries/$target" "corpus/$target" "seeds/$target" -max_total_time="$seconds" \
        -seed="${FUZZ_SEED:-0}" -runs="${FUZZ_RUNS:--1}" -max_len=32768 \
        -timeout=10 -rss_limit_mb=1024 -dict=json.dict \
        -artifact_prefix="artifacts/$target-" -print_final_stats=1 >"$log" 2>&1 || is_fine=0
    if ((is_fine)); then
        printf '%-14s %s\n' "$target" "$(grep -E '^#[0-9]+\s+DONE' "$log")"
    else
        tail -40 "$log"
        failed+=("$target")
    fi
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}; the inputs are in fuzz/artifacts" >&2
    exit 1
fi
