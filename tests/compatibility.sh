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
# Transformers, generation; JOBS, environments at a time, by default as many as there are cores.
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
jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}"
packages="import sysconfig; print(sysconfig.get_path('purelib'))"
below="$("$python" -c "$packages")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# run FOLDER REQUIREMENTS: tests in an environment whose own packages come before those that its .pth file adds
run() {
    "$python" -m venv --without-pip "$1" || return
    local own="$1/bin/python"
    echo "$below" >"$("$own" -c "$packages")/below.pth" || return
    # Of what is installed little is imported: the rest need not be compiled
    # shellcheck disable=SC2086
    "$own" -m pip install --quiet --no-compile --disable-pip-version-check $2 || return
    # What was asked for is what will be tested
    # shellcheck disable=SC2086
    "$own" -c 'import importlib.metadata as m, sys
wrong = [r for r in sys.argv[1:] if "==" in r and m.version(r.split("==")[0]).split("+")[0] != r.split("==")[1]]
sys.exit(f"not installed: {wrong}" if wrong else 0)' $2 || return
    # shellcheck disable=SC2086
    PYTHONPATH="$PWD" "$own" -m pytest -m "not slow" -q -p no:cacheprovider $tests
}

# report NUMBER REQUIREMENTS: runs them, prints the log when it is whole, and leaves a row of the table
report() {
    local started=$SECONDS outcome=FAILED
    if run "$work/$1" "$2" >"$work/$1.log" 2>&1; then outcome=passed; fi
    printf '== %s\n%s\n' "$2" "$(cat "$work/$1.log")"
    printf '%-42s %-6s %4d s  %s\n' "$2" "$outcome" $((SECONDS - started)) "$(tail -n 1 "$work/$1.log")" >"$work/$1.row"
    rm -rf "${work:?}/$1"
}

number=10
for requirements in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    number=$((number + 1))
    report "$number" "$requirements" &
done
wait
printf '\n'
cat "$work"/*.row
! grep -q " FAILED " "$work"/*.row
