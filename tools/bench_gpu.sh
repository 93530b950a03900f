#!/bin/bash
# Steps/s, model-FLOP utilisation and largest batches of the 2B shape on a GPU, in one call:
#   bash tools/bench_gpu.sh [options of tools/bench_gpu.py]
# Needs python3 with torch for CUDA; relook's other dependencies installed, or as wheels in ./wheels (see
# zoo/tools/receipts_gpu.sh). Leaves bench.md and bench.json in $OUT (out/bench-gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/bench-gpu}
venv=/tmp/relook-gpu
if [ ! -x $venv/bin/relook ]; then
    python3 -m venv --system-site-packages $venv
    from_index=$([ -d wheels ] && echo "--no-index --find-links wheels" || true)
    # shellcheck disable=SC2086
    $venv/bin/pip install --quiet --no-deps $from_index -e .
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
exec timeout 590 $venv/bin/python tools/bench_gpu.py --out "$OUT" "$@"
