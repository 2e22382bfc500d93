#!/usr/bin/env bash
# All that needs a CUDA device, in under nine minutes: the GPU tests, then every kernel benchmark.
#   scripts/measure_gpu.sh FOLDER [PYTHON]
# FOLDER gets one log and one JSON report for each part, and kernels.md with all tables and targets. A part that fails
# or runs past its limit does not stop the others. The package runs from its source, and needs no network; what it
# depends on must be importable (PYTHONPATH is kept).
set -uo pipefail
folder=${1:?give a folder for the results}
python=${2:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

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

: >"$folder/parts.txt"
timeout 150 "$python" -m pytest tests/gpu -n 4 --timeout 120 -p no:cacheprovider >"$folder/tests.log" 2>&1
echo "tests: exit $?, $(tail -n 1 "$folder/tests.log")" | tee -a "$folder/parts.txt"

bench merge 30 merge --heads gqa,mla
bench kv-write 40 kv-write
bench moe 40 moe
bench shards 40 attention --backends triton --batch "" --prefill ""
bench decode 60 attention --backends triton --prefill "" --shared-context 0
bench decode-compared 40 attention --batch 1,64 --cached 8192,131072 --prefill "" --shared-context 0
bench decode-quantised 50 attention --backends triton --kv-cache-dtype fp8,int8 --batch 1,64 --cached 131072 \
    --prefill "" --shared-context 0
bench prefill 50 attention --heads gqa --batch "" --shared-context 0

# What torch.compile and FP8 products would win in a layer of 8 billion parameters.
part layers 80 "$python" scripts/measure_layers.py

# A Llama of random weights: a decode step with and without CUDA graphs, against its floor and against transformers.
timeout 60 "$python" scripts/random_model.py "$folder/llama" 2>"$folder/llama.log"
part model-decode 120 "$python" scripts/measure_decode.py "$folder/llama" --batch 1,32 --context 8192
rm -rf "$folder/llama"
# With MODEL=a folder of SmolLM2: tokens that fit and agree with a quantised cache.
[ -z "${MODEL:-}" ] || part kv-dtypes 60 "$python" scripts/measure_kv_dtypes.py "$MODEL" docs/architecture.md

"$python" scripts/summarise_kernels.py "$folder" | tee -a "$folder/parts.txt"
