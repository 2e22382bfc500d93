#!/usr/bin/env bash
# All that needs a CUDA device, in under five minutes, the most telling first: GPU tests, whole steps, kernels.
#   scripts/measure_gpu.sh FOLDER [PYTHON]
# FOLDER gets one log and one JSON report for each part, and kernels.md with all tables and targets. A part that fails
# or runs past its limit does not stop the others. The package runs from its source, and needs no network; what it
# depends on must be importable (PYTHONPATH is kept). With BASE=a folder of an older version's package, whole steps are
# measured with that one too.
set -uo pipefail
folder=${1:?give a folder for the results}
python=${2:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
paths=${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH="src$paths" PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND...: stdout to NAME.json, stderr to NAME.log
part() {
    local name=$1 limit=$2 started=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$folder/$name.json" 2>"$folder/$name.log"
    status=$?
    echo "$name: exit $status after $((SECONDS - started)) s" | tee -a "$folder/parts.txt"
    [ "$status" -eq 0 ] || tail -n 5 "$folder/$name.log"
}

bench() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -c 'from longspan.cli.main import main; main()' bench "$@" --device cuda --json
}

# Whole steps of a folder's model, and of the older version in turn.
steps() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" scripts/measure_steps.py "$@"
    [ -z "${BASE:-}" ] || PYTHONPATH="$BASE$paths" part "$name-base" "$limit" "$python" scripts/measure_steps.py "$@"
    grep -hE '^(start|batch|prefill)' "$folder/$name.log" "$folder/$name-base.log" 2>/dev/null
}

: >"$folder/parts.txt"
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
"$python" scripts/random_model.py "$models/llama" 2>"$folder/models.log" &
"$python" scripts/random_model.py "$models/deepseek" --family deepseek-v2 2>>"$folder/models.log" &
started=$SECONDS
timeout 130 "$python" -m pytest tests/gpu -m gpu -n 12 --timeout 60 -q -p no:cacheprovider >"$folder/tests.log" 2>&1
echo "tests: exit $? after $((SECONDS - started)) s, $(tail -n 1 "$folder/tests.log")" | tee -a "$folder/parts.txt"
grep -hE '^(FAILED|ERROR)' "$folder/tests.log" | cut -c1-200
wait

steps dense 75 "$models/llama" max_num_batched_tokens=8192 --kernels 12
steps mixture 75 "$models/deepseek" max_num_batched_tokens=8192 --cases 1x1024,16x1024 --prefill 8192
part draw 45 "$python" scripts/measure_draw.py --rounds 2 ${BASE:+--other base="$BASE"}
grep -hE '^ ' "$folder/draw.log"
bench decode 35 attention --heads gqa,mla,mla16 --backends triton --prefill "" --shared-context 0 --batch 1,64 \
    --cached 8192,131072
bench prefill 35 attention --heads gqa --backends triton --batch "" --shared-context 0
bench moe 30 moe
bench moe-fp8 20 moe --weights fp8 --shape 64x6x2048x1408
bench moe-mxfp4 25 moe --weights mxfp4 --shape 128x4x2880x2880 --rows 1,16,256
bench merge 15 merge --heads gqa,mla
bench kv-write 20 kv-write
bench shards 25 attention --backends triton --batch "" --prefill ""
# With MODEL=a folder of SmolLM2: tokens that fit and agree with a quantised cache.
[ -z "${MODEL:-}" ] || part kv-dtypes 60 "$python" scripts/measure_kv_dtypes.py "$MODEL" docs/architecture.md

"$python" scripts/summarise_kernels.py "$folder" | tee -a "$folder/parts.txt"
