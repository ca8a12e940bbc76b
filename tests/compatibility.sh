#!/usr/bin/env bash
# Tests on other versions of the libraries than those that are installed, and a table of what came out.
#
#   tests/compatibility.sh ["REQUIREMENT ..."] ...
#
# Each argument is one environment, such as "transformers==5.18.0" or "torch==2.11.0 transformers==5.17.0"; without
# any, the newest of each minor release of Transformers between the ends of the supported range, which CI tests at
# length. An environment is laid over the packages of $PYTHON (python), which must have `pip install -e ".[test]"`, and
# removed afterwards: nothing installed is changed. A torch other than 2.13.0 brings 5 GB of CUDA packages.
#
# Settings, by environment variable: PYTHON; TESTS, by default a short set: registration, parity with native
# Transformers, generation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -eq 0 ]; then
    set -- transformers=={5.22.2,5.21.1,5.20.2,5.19.0,5.18.0}
fi
python="${PYTHON:-python}"
short="tests/test_registration.py tests/models/test_parity.py::test_prefill_and_decode
tests/models/test_generation.py::test_greedy_mtp_equals_plain_decoding[left-2]
tests/models/test_generation.py::test_static_cache_with_room_behind_a_short_prompt"
tests="${TESTS:-$short}"
packages="import sysconfig; print(sysconfig.get_path('purelib'))"
below="$("$python" -c "$packages")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# run REQUIREMENTS: tests in an environment whose own packages come before those that its .pth file adds
run() {
    "$python" -m venv --without-pip "$work/venv" || return
    local own="$work/venv/bin/python"
    echo "$below" >"$("$own" -c "$packages")/below.pth" || return
    # shellcheck disable=SC2086
    "$own" -m pip install --quiet --disable-pip-version-check $1 || return
    # What was asked for is what will be tested
    # shellcheck disable=SC2086
    "$own" -c 'import importlib.metadata as m, sys
wrong = [r for r in sys.argv[1:] if "==" in r and m.version(r.split("==")[0]).split("+")[0] != r.split("==")[1]]
sys.exit(f"not installed: {wrong}" if wrong else 0)' $1 || return
    # shellcheck disable=SC2086
    PYTHONPATH="$PWD" "$own" -m pytest -m "not slow" -q -p no:cacheprovider $tests 2>&1 | tee "$work/log"
}

failed=0
table=()
for requirements in "$@"; do
    echo "== $requirements"
    started=$SECONDS
    echo "not run" >"$work/log"
    if run "$requirements"; then outcome=passed; else outcome=FAILED failed=1; fi
    took=$((SECONDS - started))
    table+=("$(printf '%-42s %-6s %4d s  %s' "$requirements" "$outcome" "$took" "$(tail -n 1 "$work/log")")")
    rm -rf "$work/venv"
done
printf '\n'
printf '%s\n' "${table[@]}"
exit "$failed"
