#!/usr/bin/env bash
# Everything that takes an NVIDIA GPU, in two runs of under ten minutes: bash benchmarks/gpu_check.sh OUT [1|2]
#
# Needs Linux, an NVIDIA driver, and a python3 (or $PYTHON) with torch >= 2.10 and triton >= 3.6, which it uses in place: no network,
# no git, no new environment. 1 checks (compiled code, float64, determinism, sanitizer), 2 measures; without a number both.
# benchmarks/gpu_check.py says what is done; a step that fails is recorded in OUT/check.json, and the next one goes on.
set -u
if [ $# -lt 1 ]; then
  echo "error: no folder for the results is named"
  echo "  it is the first argument, the part (1 or 2) the second"
  echo "  bash benchmarks/gpu_check.sh results-gpu 1"
  exit 2
fi
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
