#!/usr/bin/env bash
# Everything that needs a GPU, in one command: bench/gpu_suite.sh OUT; see --help. PYTHON chooses the interpreter.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_suite.py" "$@"
