#!/usr/bin/env bash
# What a GPU has to show, in under 8 minutes: tests, then the benchmark. Writes one JSON file and one table.
#
#   tests/gpu/run.sh [FOLDER] [--minutes N] [--only STAGE,...] [--device cpu]
#
# Needs torch 2.11 or newer for GPUs with its Triton, Transformers 5.17 or newer, and nothing else: no network, no
# installation of this package, no peft, trl or pytest. README.md beside this file has the rest.
# Settings, by environment variable: PYTHON (python3), the interpreter that has them.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
