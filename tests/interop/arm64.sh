#!/usr/bin/env bash
# Loads a small model, compresses it to 4 bits and writes text, by Python and torch on an emulated 64-bit ARM processor and
# by those of this machine, and compares: fp32 and bf16.
#
#   tests/interop/arm64.sh FOLDER [CPU]
#
# FOLDER keeps Debian for arm64 and the packages (1.5 GB) for the next run. CPU is qemu's, by default max: PyPI's wheels
# stop with an illegal instruction on cortex-a53. Needs root, Debian's debootstrap, qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross, and a
# `python` that has this package installed. Two minutes of processor time, and as much for the packages the first time.
# PyPI's last torch for this processor without CUDA is 2.10, older than the package asks for: it does here.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cpu=${2:-max}
debian=$folder/debian
python=${PYTHON:-python}

if [ ! -e "$folder/.installed" ]; then
    rm -rf "$debian" "$folder/packages"
    # Not the second stage, which needs qemu within: unpacked is enough
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3.11,libgomp1,libstdc++6 bookworm "$debian" \
        http://deb.debian.org/debian
    for package in "$debian"/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$debian"
    done
    # By pip of this machine. What torch needs it is not asked: it would add the packages of this machine's kind
    install() {
        "$python" -m pip install --quiet --target "$folder/packages" --only-binary=:all: --python-version 311 \
            --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 "$@"
    }
    install --no-deps "torch==${TORCH:-2.10.0}" accelerate peft trl
    install "transformers==$("$python" -c 'import transformers; print(transformers.__version__)')" safetensors \
        filelock typing-extensions sympy networkx jinja2 fsspec psutil datasets
    touch "$folder/.installed"
fi

rm -rf "$folder/library"
CC=aarch64-linux-gnu-gcc "$python" "$root/setup.py" -q build_ext --build-lib "$folder/library"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
cd "$root"
generate=tests/interop/arm64_generate.py
OMP_NUM_THREADS=1 PYTHONPATH=$root "$python" "$generate" make "$folder/checkpoint"
PYTHONPATH=$root "$python" "$generate" run "$folder/checkpoint" "$folder/here.json"
qemu-aarch64 -cpu "$cpu" -L "$debian" -E "LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu" \
    -E "PYTHONPATH=$root:$folder/packages" -E "TRANSFORMERS_DSV3_CPU_LIBRARY=$folder/library/transformers_dsv3/kernels" \
    "$debian/usr/bin/python3.11" "$generate" run "$folder/checkpoint" "$folder/arm64.json"
"$python" "$generate" compare "$folder/here.json" "$folder/arm64.json"
