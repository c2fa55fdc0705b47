#!/usr/bin/env bash
# Everything that takes an NVIDIA GPU, in under ten minutes: bash benchmarks/gpu_check.sh
#
# Needs Linux, an NVIDIA driver and Python 3.11 or later; uses the environment in $VENV (default .venv-gpu, made here
# with torch >= 2.11 and triton >= 3.6). Runs the kernels on the GPU against float64, their determinism, graph replay,
# compute-sanitizer where it is installed, and the bench; writes benchmarks/results/gpu-CARD.{json,csv,txt}.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-gpu}
PYTHON=${PYTHON:-python3}
command -v nvidia-smi >/dev/null || { echo "error: nvidia-smi is not there"; echo "  this check is for a machine with an NVIDIA GPU"; echo "  make gates checks the kernels without one"; exit 5; }
if [ ! -x "$VENV/bin/python" ]; then
  "$PYTHON" -m venv --system-site-packages "$VENV"
  "$VENV/bin/python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || "$VENV/bin/pip" install -q 'torch>=2.11'
  "$VENV/bin/pip" install -q -e '.[train,dev]'
fi
CARD=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' /' '--')
OUT=benchmarks/results/gpu-$CARD
mkdir -p benchmarks/results
{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv
  "$VENV/bin/python" -c 'import sys, torch, triton; print(sys.version.split()[0], torch.__version__, triton.__version__)'
  git rev-parse HEAD 2>/dev/null || true
  "$VENV/bin/python" -m pytest -q tests/gpu
  if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --tool memcheck --error-exitcode 9 "$VENV/bin/python" -m pytest -q tests/gpu -k "(test_gathering or test_rope) and not float32" 2>&1 | tail -5
  else
    echo "compute-sanitizer is not installed: memory accesses were not checked"
  fi
  "$VENV/bin/python" -m retro_engine.bench kernels --device cuda --dtype bf16 fp16 --out "$OUT.bench"
} 2>&1 | tee "$OUT.txt"
cp "$OUT.bench/kernels.json" "$OUT.json" && cp "$OUT.bench/kernels.csv" "$OUT.csv" && rm -r "$OUT.bench"
echo "written: $OUT.json, $OUT.csv, $OUT.txt"
