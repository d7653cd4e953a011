#!/usr/bin/env bash
# On a GPU machine without a package registry: builds fusetune, runs the GPU tests and all benchmarks, and writes
# benchmarks/results/<device>.json, or into the folder that is its argument. PYTHON names the Python that has torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-benchmarks/results}

gpu=$("$python" - <<'END'
try:
    import torch
except ImportError as error:
    raise SystemExit(f"device.sh: {error}; PYTHON names the Python that has torch") from None
print(torch.cuda.is_available())
END
)
if [ "$gpu" = False ]; then
  echo "device.sh: no GPU that torch can use on this machine; nothing to do"
  exit 0
fi
if ! "$python" -c "import pytest_benchmark" 2>/dev/null; then
  echo "device.sh: pytest-benchmark is not installed for $python" >&2
  exit 1
fi

FUSETUNE_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
"$python" -m fusetune info

# Benchmarks run even where a test fails: both are wanted from a machine that is lent for minutes.
failed=0
"$python" -m pytest -m gpu || failed=1
mkdir -p "$results"
"$python" -m pytest benchmarks --benchmark-only \
  --benchmark-json="$results/$(basename "$("$python" benchmarks/results.py path)")" || failed=1
exit $failed
