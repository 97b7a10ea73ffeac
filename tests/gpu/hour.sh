#!/bin/bash
# One step of the hour on a GPU: `tests/gpu/hour.sh N`, N from 1 to 4 (README.md). It needs no network and no state.
#   OUT     folder that gets the archive hour.tar.gz: results and compiled kernels, at most 50 MB (build)
#   BACK    archive of an earlier step, which is taken back if it is there (build/hour.tar.gz)
#   WHEELS  folder of wheels that the machine lacks (build/wheels)
#   WORK    folder of everything else (build/gpu)
#   PYTHON  interpreter that has torch for CUDA (python3)
#   MINUTES after which the step ends by itself (9)
# `--dry` after N runs the step in its smallest form on a CPU.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
case "${1-} ${2-}" in [1-4]\ | "[1-4] --dry" | [1-4]\ --dry) ;; *) echo "usage: $0 1|2|3|4 [--dry]" >&2; exit 2 ;; esac
step=$1 dry=${2:+yes} out=${OUT:-build} back=${BACK:-build/hour.tar.gz} work=${WORK:-build/gpu} python=${PYTHON:-python3}
deadline=$(awk "BEGIN {print int(${MINUTES:-9} * 60)}") # seconds from now
results=$work/results failed=0
mkdir -p "$out" "$work" && work=$(cd "$work" && pwd) && results=$work/results && mkdir -p "$results"
if [ -f "$back" ]; then tar -xzf "$back" -C "$work" && echo "$back: taken back"; fi

archive() { # kernels only as far as they fit
  local parts
  for parts in "results kernels" "results kernels/inductor" "results"; do
    (cd "$work" && ls -d $parts 2>/dev/null | tar -czf hour.tar.gz -T -)
    [ "$(stat -c %s "$work/hour.tar.gz")" -le 50000000 ] && break
  done
  mv "$work/hour.tar.gz" "$out/hour.tar.gz"
  echo "step $step: $SECONDS s, $([ $failed = 0 ] && echo well || echo "something failed: see $results"), $out/hour.tar.gz"
  exit $failed
}
trap archive EXIT
trap 'failed=1; exit' INT TERM

run() { # NAME COMMAND…: run it while time is left, with a log
  local name=$1 left=$((deadline - SECONDS))
  shift
  if [ $left -lt 1 ]; then echo "$name: no time is left" | tee "$results/$name.log"; return 1; fi
  timeout -k 5 $left "$@" 2>&1 | tee "$results/$name.log"
}

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$work/kernels/inductor TRITON_CACHE_DIR=$work/kernels/triton
export DRAFTSMITH_GPU_ROWS=$results/tests.jsonl # a line for each test as it ends (conftest.py)
if ! "$python" -c "import draftsmith.flows" 2>/dev/null; then
  mkdir -p "$work/site/draftsmith" && ln -sfn "$PWD"/{flows,stages,artifacts} "$work/site/draftsmith/"
  export PYTHONPATH=$work/site
  if compgen -G "${WHEELS:-build/wheels}/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$work/site" "${WHEELS:-build/wheels}"/*.whl
  fi
fi

case $step in
1) run rates "$python" -m tests.gpu.rates ${dry:+--scale tiny} --out "$results" || failed=1 ;;
2) # each part compiles its kernels beside the others'; test_hour.py holds that no test is left out
  parts=(
    "attention and float32"
    "attention and bfloat16"
    "decoding and dflash"
    "decoding and eagle3"
    "decoding and not dflash and not eagle3"
    "training and dflash"
    "training and eagle3"
    "training and not dflash and not eagle3"
    "ranks"
  )
  marks=gpu
  if [ $dry ]; then parts=("attention and float32 and whole") marks="not gpu"; fi
  for part in "${parts[@]}"; do
    run "test ${part// /-}" "$python" -m pytest -q -p no:cacheprovider -rfEs --durations 10 -m "$marks" \
      -k "$part" tests/gpu/test_{attention,decoding,training,ranks}.py >/dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  tail -n 3 "$results"/test*.log
  ;;
3)
  if [ $dry ]; then
    run check "$python" -m tests.gpu.check --device cpu --scale tiny --kinds SFT --repetitions 1 --out "$results" || failed=1
  else
    run check "$python" -m tests.gpu.check --minutes 7 --out "$results" || failed=1
    run check-8b "$python" -m tests.gpu.check --scale qwen3-8b --kinds SFT --repetitions 1 --out "$results" || failed=1
  fi
  ;;
4) # side by side: neither fills a GPU
  models=(test-bed qwen3-0.6b)
  if [ $dry ]; then models=(tiny); fi
  for model in "${models[@]}"; do
    run "refresh-$model" "$python" -m tests.gpu.refresh "$model" ${dry:+--until target} --out "$results" --home "$work/$model" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  for model in "${models[@]}"; do cp -r "$work/$model/logs" "$results/logs-$model" 2>/dev/null; done
  ;;
esac
