#!/usr/bin/env bash
# On a GPU machine, which needs no package registry: builds fusetune with CUDA, runs the tests that are marked gpu, then
# all benchmarks.
#
#   benchmarks/device.sh [FOLDER [tests|benchmarks]]
#
# FOLDER, from the repository's root, receives <device>.json of the benchmarks and tests.txt; without it the one goes to
# benchmarks/results, the other to build/device. PYTHON names the Python that has torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-benchmarks/results}
log=${1:-build/device}/tests.txt
parts=${2:-tests benchmarks}
export HF_HUB_OFFLINE=1

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
modules="pybind11 pytest"
if [[ $parts = *benchmarks* ]]; then modules+=" pytest_benchmark"; fi
for module in $modules; do
  if ! "$python" -c "import $module" 2>/dev/null; then
    echo "device.sh: $module is not installed for $python" >&2
    exit 1
  fi
done

# CMake alone, and a package of links to the sources: setup.py needs a setuptools that such machines often lack.
package=build/device/site/fusetune
rm -rf build/device/site
mkdir -p "$package" "$results" "$(dirname "$log")"
ln -s "$PWD"/pyfront/* "$PWD/kernels" "$package"
rm -f "$package"/_C.*.so
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S . -B build/device/cmake "${generator[@]}" -DFUSETUNE_CUDA=1 -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/$package" \
  -DPython_EXECUTABLE="$("$python" -c "import sys; print(sys.executable)")" \
  -Dpybind11_DIR="$("$python" -c "import pybind11; print(pybind11.get_cmake_dir())")"
cmake --build build/device/cmake --parallel
export PYTHONPATH="$PWD/build/device/site${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m fusetune info

# What fails stops nothing else, nor do files that need a package which is not there: all the rest is wanted from a
# machine that is lent for minutes.
pytest=("$python" -m pytest --continue-on-collection-errors)
failed=0
if [[ $parts = *tests* ]]; then
  "${pytest[@]}" -m gpu -rs --durations=10 2>&1 | tee "$log" || failed=1
fi
if [[ $parts = *benchmarks* ]]; then
  "${pytest[@]}" benchmarks --benchmark-only \
    --benchmark-json="$results/$(basename "$("$python" benchmarks/results.py path)")" || failed=1
fi
exit $failed
