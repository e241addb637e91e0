#!/usr/bin/env bash
# Counts the launches of each kernel of a program that `tools/cuda-build.sh` built, on a machine without a
# GPU: the driver in `launches` executes nothing. Times that the program prints are those of the CPU alone,
# and its other results mean nothing.
#
#   tools/gpu/launches.sh DIR/PROGRAM [ARGUMENT..]
#
# Needs a C compiler. What a step or a token launches is the difference of two runs.
set -euo pipefail
if (($# == 0)); then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
sources="$(dirname "$(realpath "$0")")/launches"
program="$(realpath "$1")"
shift
if [[ ! -e "$program" && -e "$program.xz" ]]; then
    xz --decompress --keep "$program.xz" && chmod +x "$program"
fi
toolkit="$(mktemp -d)"
trap 'rm -r "$toolkit"' EXIT
# CubeCL looks for headers before it compiles.
mkdir "$toolkit/include"
for library in driver:libcuda.so nvrtc:libnvrtc.so; do
    cc -O1 -w -shared -fPIC -o "$toolkit/${library#*:}" "$sources/${library%:*}.c"
done
export CUDA_PATH="$toolkit" LD_LIBRARY_PATH="$toolkit"
stub="$(dirname "$program")/stub.so"
if [[ -e "$stub" ]]; then
    LD_PRELOAD="$stub" "$program" "$@"
else
    "$program" "$@"
fi
