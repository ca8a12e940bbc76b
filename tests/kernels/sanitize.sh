#!/usr/bin/env bash
# Runs the compiled operators' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer, for every
# instruction set that this machine has. Needs GCC and its libasan.
#
#   tests/kernels/sanitize.sh [PYTEST OPTIONS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python="${PYTHON:-python}"
export CC="${CC:-gcc}"

sanitizers="-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
CFLAGS="-O1 -g -fno-omit-frame-pointer $sanitizers" LDFLAGS="$sanitizers" \
    "$python" setup.py -q build_ext --build-lib "$work"
export TRANSFORMERS_DSV3_CPU_LIBRARY="$work/transformers_dsv3/kernels"
ls "$TRANSFORMERS_DSV3_CPU_LIBRARY"/_cpu.so >/dev/null || { cat "$TRANSFORMERS_DSV3_CPU_LIBRARY"/*.txt; exit 1; }

# Python keeps much until it ends, which is not a leak of the library's
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# pytest must not keep what the sanitizer writes to file descriptor 2 before it ends the process.
# libstdc++ too, or the sanitizer does not find what it intercepts when torch throws
LD_PRELOAD="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libstdc++.so)" \
    "$python" -m pytest -p no:cacheprovider --capture=sys \
    tests/kernels/test_cpu_{linear,mixture,attention,route,rows,sample,freed}.py \
    tests/models/test_{decoding,decoding_steps,mtp_decoding,paged}.py "$@"
