#!/usr/bin/env bash
# Shows on a machine with an NVIDIA GPU that the operations are right there, that training there gives
# the losses of the CPU, that a merged model verifies, that no kernel reads out of bounds, and how fast
# it is. Takes less than six minutes, and no network.
#
#   run.sh [OUT] [TORCH]   of the folder that tools/cuda-build.sh made
#
# Each step has a time limit and a log in OUT, `gpu-results` by default; the exit status is the number
# of steps that failed. TORCH is a Python program that measures PyTorch in the same run. It is called
# as `TORCH products 4096 4096`, `TORCH fit 1b lora 4 1024` and `TORCH fit 1b qlora 4 1024`.
set -uo pipefail
out="$(realpath -m "${1:-gpu-results}")"
torch="${2:+$(realpath "$2")}"
cd "$(dirname "$0")"
mkdir -p "$out"

export CUDA_PATH="${CUDA_PATH:-/usr/local/cuda}"
nvrtc="$(compgen -G "$CUDA_PATH/lib64/libnvrtc.so*" | head -n 1)"
if [[ -z "$nvrtc" ]]; then
    nvrtc="$(find / -xdev -name 'libnvrtc.so*' -not -path '/proc/*' 2>/dev/null | head -n 1)"
fi
if [[ -z "$nvrtc" || ! -e "$CUDA_PATH/include/cuda_fp16.h" ]]; then
    echo "no CUDA toolkit in $CUDA_PATH: libnvrtc.so and include/cuda_fp16.h are needed" >&2
    exit 100
fi
export LD_LIBRARY_PATH="$(dirname "$nvrtc"):$CUDA_PATH/lib64:${LD_LIBRARY_PATH:-}"
export RUST_BACKTRACE=1
preload=()
[[ -e stub.so ]] && preload=("LD_PRELOAD=$PWD/stub.so")
for packed in *.xz; do
    program="${packed%.xz}"
    if [[ ! -e "$program" ]]; then
        xz --decompress --keep --threads=0 "$packed" && chmod +x "$program"
    fi
done
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
date --utc +%F | tee -a "$out/card.txt"

failed=0
results=()
# `step NAME SECONDS COMMAND..` runs a command with a time limit and a log.
step() {
    local name="$1" limit="$2" began=$SECONDS status=0
    shift 2
    env "${preload[@]}" timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    finish "$name" "$status" $((SECONDS - began))
}
# `finish NAME STATUS SECONDS` reports a step.
finish() {
    local verdict=ok
    if (($2 != 0)); then
        verdict="FAILED ($2)"
        failed=$((failed + 1))
    fi
    results+=("$(printf '%-28s %-13s %4d s' "$1" "$verdict" "$3")")
    printf '\n=== %s\n' "${results[-1]}"
    tail -n 30 "$out/$1.log" | cut -c1-300
    return "$2"
}

# On the CPU, while the GPU is busy.
steps=(--bits 4 --steps 60)
rm -rf "$out"/adapt-*
env "${preload[@]}" timeout 150 ./adapt --device flex "${steps[@]}" --out "$out/adapt-flex" \
    >"$out/adapt-flex.log" 2>&1 &
on_cpu=$!

# Each test compiles its kernels in a process of its own.
mapfile -t tests < <(env "${preload[@]}" ./kernels --list | sed -n 's/^\(conformance::cuda::.*\): test$/\1/p')
if ((${#tests[@]} == 0)); then
    echo "no test of conformance on CUDA in ./kernels" >&2
    exit 100
fi
step conformance 180 xargs -P "$(nproc)" -n 1 ./kernels --exact < <(printf '%s\n' "${tests[@]}")
step adapt-f32 60 ./adapt --device cuda "${steps[@]}" --out "$out/adapt-f32"
dtypes=(f32)
if ./adapt --help 2>&1 | grep -q -- --dtype; then
    step adapt-bf16 60 ./adapt --device cuda --dtype bf16 "${steps[@]}" --out "$out/adapt-bf16"
    dtypes+=(bf16)
fi
began=$SECONDS
status=0
wait "$on_cpu" || status=$?
finish adapt-flex "$status" $((SECONDS - began))
for dtype in "${dtypes[@]}"; do
    bound=1e-3
    [[ "$dtype" == bf16 ]] && bound=2e-2
    step "losses-$dtype" 10 python3 losses.py \
        "$out/adapt-flex/report.json" "$out/adapt-$dtype/report.json" "$bound"
    step "verify-$dtype" 30 ./verify --device flex "$out/adapt-$dtype/4-bit"
done

# One step of training, every access of memory checked.
sanitizer="$(command -v compute-sanitizer || echo "$CUDA_PATH/bin/compute-sanitizer")"
one_step=(./fit_step --device cuda --dtype bf16 --modes lora-g128 --batch 4 --seq-len 256 --steps 0)
memcheck=("$sanitizer" --tool memcheck --error-exitcode 9)
if ! step memcheck 90 "${memcheck[@]}" "${one_step[@]}"; then
    # Which operation it is: conformance names it.
    step memcheck-conformance 180 "${memcheck[@]}" ./kernels conformance::cuda::step conformance::cuda::batches
fi

step products 40 ./products --device cuda --dtype bf16
large=(--device cuda --dtype bf16 --model 1b --batch 4 --seq-len 1024 --steps 8)
step fit-1b 90 ./fit_step "${large[@]}" --modes lora-g128,qlora-nf4,peqa-g128
step fit-1b-checkpointed 40 ./fit_step "${large[@]}" --modes lora-g128 --checkpoint-blocks
step decode 60 ./decode --device cuda --dtype bf16 --model 110m,1b
if [[ -n "$torch" ]]; then
    step torch-products 40 python3 "$torch" products 4096 4096
    step torch-fit-1b-lora 40 python3 "$torch" fit 1b lora 4 1024
    step torch-fit-1b-qlora 40 python3 "$torch" fit 1b qlora 4 1024
fi

printf '\n%s seconds\n' "$SECONDS"
printf '%s\n' "${results[@]}" | tee "$out/results.txt"
exit "$failed"
