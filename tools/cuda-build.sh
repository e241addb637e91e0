#!/usr/bin/env bash
# Builds the conformance tests, programs and benches for CUDA and packs them, stripped, into one folder
# that runs on a machine with a GPU and without a network: `run.sh` there does the rest.
#
#   tools/cuda-build.sh [--without-llvm] [OUT]
#
# OUT is `target/cuda/pack` by default. That machine needs a driver and a CUDA toolkit (NVRTC and its
# headers; CUDA_PATH if it is not in /usr/local/cuda), because the kernels are compiled there.
#
# CubeCL links LLVM for another compiler of kernels, which is not used here, and its build script
# downloads it. --without-llvm links without it: the functions of LLVM are left unresolved, and
# `stub.so`, which `run.sh` loads before the programs, has functions of their names that abort.
#
# The folder target/cuda is for these builds alone: with other flags of the linker, all is built again.
# Needs a C compiler, binutils, xz and Python 3.
set -euo pipefail
cd "$(dirname "$0")/.."

without_llvm=false
out="$PWD/target/cuda/pack"
for argument in "$@"; do
    case "$argument" in
        --without-llvm) without_llvm=true ;;
        -*)
            sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
            exit 2
            ;;
        *) out="$argument" ;;
    esac
done
for program in cc nm strip xz python3; do
    if ! command -v "$program" >/dev/null; then
        echo "cuda-build.sh needs $program" >&2
        exit 1
    fi
done

export CARGO_TARGET_DIR="$PWD/target/cuda"
# With a target, flags are for what it runs, and not for build scripts.
target="$(rustc --print host-tuple)"
if "$without_llvm"; then
    export DOCS_RS=1
    export RUSTFLAGS="${RUSTFLAGS:-} -C link-arg=-Wl,--unresolved-symbols=ignore-all"
fi
targets=(--test kernels --example adapt --example verify)
targets+=(--bench fit_step --bench decode --bench products)
built="$(cargo build --release --workspace --features cuda --target "$target" "${targets[@]}" \
    --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    built = json.loads(line)
    if built.get("executable") and built["target"]["kind"] != ["custom-build"]:
        print(built["target"]["name"], built["executable"])')"

rm -rf "$out"
mkdir -p "$out"
symbols="$out/symbols"
: >"$symbols"
while read -r name path; do
    # Only these: the other undefined symbols are weak ones of the C library.
    nm -D --undefined-only "$path" | awk '{print $NF}' | grep -E '^(LLVM|cubecl_)' >>"$symbols" || true
    strip -o "$out/$name" "$path"
done <<<"$built"
if [[ -s "$symbols" ]]; then
    {
        echo '#include <stdlib.h>'
        sort -u "$symbols" | sed 's/.*/void &(void) { abort(); }/'
    } >"$out/stub.c"
    cc -w -fno-builtin -shared -fPIC -o "$out/stub.so" "$out/stub.c"
    rm "$out/stub.c"
fi
rm "$symbols"
xz --threads=0 "$out"/{kernels,adapt,verify,fit_step,decode,products}
cp tools/gpu/run.sh tools/gpu/losses.py "$out"
du -h "$out"/*
