#!/usr/bin/env bash
# Everything a GPU is needed for, in under ten minutes and without a network: install, tests, benchmarks, a summary.
#
#   benchmarks/gpu_report.sh [--dry-run] [RESULTS]
#
# RESULTS (default benchmarks/results) gets <gpu>/interaction.json and summary.txt. Wants a Python with torch, triton,
# numpy, setuptools, pybind11, pytest and pytest-benchmark: $PYTHON, default python3. Nothing is installed into it.
# --dry-run needs no GPU: the same steps with one tiny case on the CPU, by default into a temporary folder.
# A step that fails does not stop the others. The exit code is 0 only if all succeeded; 2 means that there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true; shift; fi
workspace=$(mktemp -d)
if $dry_run; then default_results=$workspace/results; else default_results=benchmarks/results; fi
results=${1:-$default_results}
python=${PYTHON:-python3}
budget=580  # seconds, of which the summary needs a few
failures=()

if ! $dry_run && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "There is no GPU that torch can use here: nothing was run. --dry-run tries the steps without one." >&2
  rm -rf "$workspace"
  exit 2
fi

# step NAME SECONDS COMMAND...: interrupted after SECONDS, so that pytest still writes what it has.
step() {
  local name=$1 seconds=$2 code
  shift 2
  echo "== $name (at most $seconds s): $*"
  timeout --signal=INT --kill-after=20 "$seconds" "$@"
  code=$?
  if ((code == 0)); then return; fi
  if ((code == 124 || code == 137)); then
    failures+=("$name: stopped after $seconds s")
  else
    failures+=("$name: exit code $code")
  fi
}

# Into a folder of its own: the image may forbid changes to its environment, and a checkout on the path would be
# imported without its compiled parts.
export PYTHONPATH="$workspace/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
mkdir -p "$results"
step install 200 "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$workspace/site" .
step backends 60 "$python" -c 'import btinet_kernels; btinet_kernels.backends()'

tests=(-m gpu tests/kernels)
selection=(--device cuda)
if $dry_run; then
  tests=(tests/kernels/test_backends.py)
  selection=(--device cpu --quick --shapes 384x14 --rounds 3)
fi
step tests 180 "$python" -m pytest -q "${tests[@]}" --junitxml "$workspace/tests.xml"

left=$((budget - SECONDS - 10))
# The last case begins early enough to be finished; cases come in order of importance.
step benchmarks "$left" "$python" -m pytest -q benchmarks/ --benchmark-only --benchmark-disable-gc "${selection[@]}" \
  --time-limit $((left > 90 ? left - 60 : left / 2)) --save-results --results "$results"

step summary 30 env -u PYTHONSAFEPATH "$python" benchmarks/gpu_summary.py "$results" --tests "$workspace/tests.xml" --seconds "$SECONDS"

if ((${#failures[@]})); then printf 'FAILED %s\n' "${failures[@]}" | tee -a "$results/summary.txt"; fi
if $dry_run && [[ $results == "$default_results" ]]; then echo "dry run: results are discarded"; fi
rm -rf "$workspace"
((${#failures[@]} == 0))
