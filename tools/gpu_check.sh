#!/usr/bin/env bash
# Turns minutes on a machine with a GPU into evidence: tests, sanitizers and benchmarks of this checkout in one command.
#
#   make gpu-check, or bash tools/gpu_check.sh
#
# Needs a Python with torch and pytest; pytest-xdist is used where it is there. No network, no virtual environment.
#
#   OUT                 the folder of the results, at most seven files; build/gpu-check by default
#   GPU_CHECK_DEVICE    cuda, or cpu: a dry run of the same steps without a GPU
#   GPU_CHECK_SECONDS   the whole budget, 540 by default; a step that would not fit is left out, none is cut short
#   GPU_CHECK_STEPS     the steps to take, all by default; a second call can take what the first one left out
#   PYTHON              python3 by default
#
# Exit status: 0 when every test and sanitizer passed, 1 when one failed, 2 when none failed but one was left out.
# Without a GPU the sanitizers and the graph capture are not asked for.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
DEVICE=${GPU_CHECK_DEVICE:-cuda}
BUDGET=${GPU_CHECK_SECONDS:-540}
TOOLS="memcheck racecheck initcheck synccheck"
STEPS=${GPU_CHECK_STEPS:-capture tests paths $TOOLS benchmarks}
PY=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-build/gpu-check}")
mkdir -p "$OUT"
for name in env.txt build.log tests.log sanitizers.log benchmarks.log summary.txt; do rm -f "$OUT/$name"; done
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
export TORCHINDUCTOR_CACHE_DIR
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
failed="" left_out=""

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$OUT/summary.txt"; }
left() { echo $((BUDGET - SECONDS)); }

# run_step NAME SECONDS KIND LOG COMMAND...: takes a step if SECONDS remain for it, which is also what ends a step that
# hangs. KIND is `required`, or `optional` where the exit status does not depend on it.
run_step() {
  local name=$1 needed=$2 kind=$3 log=$OUT/$4 before=$SECONDS status
  shift 4
  [[ " $STEPS " == *" ${name%% *} "* ]] || { say "$name: not asked for"; return 1; }
  if [ "$(left)" -lt "$needed" ]; then
    say "$name: LEFT OUT, $(left) s remain and it may take $needed"
    [ "$kind" = required ] && left_out+=" ${name%% *}"
    return 1
  fi
  { echo "===== $name"; timeout "$needed" "$@" 2>&1; } >> "$log"
  status=$?
  if [ $status = 0 ]; then say "$name: passed in $((SECONDS - before)) s: $(tail -1 "$log" | cut -c1-110)"
  else
    say "$name: FAILED with status $status in $((SECONDS - before)) s: $(tail -1 "$log" | cut -c1-110)"
    [ "$kind" = required ] && failed+=" ${name%% *}"
  fi
  return $status
}

describe_machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,compute_cap --format=csv,noheader
  nvcc --version | tail -2
  c++ --version | head -1
  compute-sanitizer --version | tail -1
  echo "$(nproc) cores, $(date -u '+%Y-%m-%d %H:%M UTC'), commit $(git rev-parse --short HEAD)"
  "$PY" - << 'END'
import importlib.metadata, sys
import torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("pytest", "pytest-xdist", "hypothesis", "numpy", "triton"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
END
}

# The library is there, and if there is a GPU has code for it.
loads() {
  "$PY" - "$DEVICE" << 'END' >> "$OUT/build.log" 2>&1
import sys
import torch
from quantkernels import _ops
built = _ops.build_info()
print("library:", built)
if sys.argv[1] == "cuda":
    wanted = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if wanted not in built["cuda_architectures"].split():
        sys.exit(f"it has no code for {wanted}")
END
}

build() {
  local architecture=""
  [ "$DEVICE" = cuda ] &&
    architecture=$("$PY" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  TORCH_CUDA_ARCH_LIST=$architecture QUANTKERNELS_CUDA=$([ "$DEVICE" = cuda ] && echo 1 || echo 0) \
    timeout 240 "$PY" setup.py -q build_ext --inplace >> "$OUT/build.log" 2>&1
}

: > "$OUT/summary.txt"
describe_machine > "$OUT/env.txt" 2>&1
say "gpu-check on $DEVICE, $BUDGET s; $(grep '^python' "$OUT/env.txt" || echo "$PY has no torch")"
if [ "$DEVICE" = cuda ]; then
  "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' > /dev/null 2>&1 ||
    { say "FAILED: torch finds no GPU here; GPU_CHECK_DEVICE=cpu is a dry run"; exit 1; }
  say "$(head -1 "$OUT/env.txt")"
fi
if ! loads; then
  say "library: $(tail -1 "$OUT/build.log" | cut -c1-150)"
  build
  loads || { say "library: FAILED to build or to load: $(tail -1 "$OUT/build.log" | cut -c1-150)"; exit 1; }
  say "library: built"
fi
say "$(tail -1 "$OUT/build.log")"

# minversion and warnings are the project's own taste, which must not stop a run with another pytest or torch.
PYTEST=("$PY" -m pytest -q -p no:cacheprovider -o minversion=7.0 -W default --device "$DEVICE" --tb=short)
WORKERS=()
"$PY" -c 'import xdist' 2> /dev/null && WORKERS=(-p xdist.plugin -n "$([ "$DEVICE" = cuda ] && echo 6 || echo 2)")
PATHS=("$PY" tests/launch_paths.py --device "$DEVICE")

if [ "$DEVICE" = cuda ]; then
  # Alone and first: the kernels are loaded during the capture.
  run_step "capture of a graph in a fresh process" 60 required tests.log "${PYTEST[@]}" tests/test_cuda.py -k graph_capture
  run_step "tests" 200 required tests.log "${PYTEST[@]}" "${WORKERS[@]}" tests/test_cuda.py
else
  say "capture of a graph in a fresh process: needs a GPU"
  run_step "tests" 200 required tests.log "${PYTEST[@]}" "${WORKERS[@]}" tests/test_functional.py -k observe_layouts
fi
[ -f "$OUT/tests.log" ] && grep -E '^(FAILED|ERROR)' "$OUT/tests.log" | head -12 | cut -c1-150 | tee -a "$OUT/summary.txt"

BIG=()
[ "$DEVICE" = cuda ] && BIG=(--big)
run_step "paths of launches" 90 required sanitizers.log "${PATHS[@]}" "${BIG[@]}"

# compute-sanitizer over the launch paths. Without torch's caching allocator an access past a tensor's end leaves its
# allocation. Only our kernels are looked at, but for initcheck: torch's initialise what ours read.
KERNELS=()
if command -v compute-sanitizer > /dev/null; then
  [[ $(compute-sanitizer --help 2>&1) == *--kernel-regex* ]] && KERNELS=(--kernel-regex kns=qk)
  [[ $(compute-sanitizer --help 2>&1) == *--kernel-name* ]] && KERNELS=(--kernel-name kns=qk)
fi
BENCHMARKS_SECONDS=75
for tool in $TOOLS; do
  if [ "$DEVICE" != cuda ]; then say "$tool: needs a GPU"; continue; fi
  if ! command -v compute-sanitizer > /dev/null; then
    say "$tool: LEFT OUT, compute-sanitizer is not installed"
    left_out+=" $tool"
    continue
  fi
  CHECK=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20)
  [ "$tool" = initcheck ] || CHECK+=("${KERNELS[@]}")
  CHECK+=("${PATHS[@]}")
  [ "$tool" = memcheck ] && CHECK+=(--big)
  BUDGET=$((BUDGET - BENCHMARKS_SECONDS))
  run_step "$tool" 75 required sanitizers.log "${CHECK[@]}"
  BUDGET=$((BUDGET + BENCHMARKS_SECONDS))
done

needed=$(left)
[ "$needed" -lt "$BENCHMARKS_SECONDS" ] && needed=$BENCHMARKS_SECONDS
seconds=$((needed - 30)) # no case begins after that
[ "$DEVICE" = cpu ] && [ "$seconds" -gt 2 ] && seconds=2
run_step "benchmarks" "$needed" optional benchmarks.log \
  "$PY" -m benchmarks $([ "$DEVICE" = cuda ] && echo "--device cuda" || echo --dry-run) \
  --output "$OUT" --seconds "$seconds"
[ -f "$OUT/benchmarks.log" ] &&
  { sed -n '/^figures:/,$p' "$OUT/benchmarks.log" | sed '1d;$d'; grep ^FAILED "$OUT/benchmarks.log" | head -8; } |
  cut -c1-150 | tee -a "$OUT/summary.txt"

for file in "$OUT"/*; do [ "$(stat -c %s "$file")" -gt 8000000 ] && truncate -s 8000000 "$file"; done
if [ -n "$failed" ]; then say "FAILED:$failed${left_out:+; left out:$left_out}"; exit 1; fi
if [ -n "$left_out" ]; then say "nothing failed; left out:$left_out"; exit 2; fi
say "every test and sanitizer that was asked for passed"
