#!/bin/bash
# The arms of zoo/receipts.md at a scale for a GPU (19 M parameters, and 59 M for the large control), in calls of under
# ten minutes:   bash zoo/tools/receipts_gpu.sh [MINUTES]      give it again, while the machine lasts, until it says "done".
#
# Needs: python3 with torch for CUDA; relook's other dependencies installed, or as wheels in ./wheels (made elsewhere by
#   pip download -d wheels --no-deps transformers==... and so on, see constraints.txt); scans in ./shared/data/receipts or
#   ../shared/data/receipts (without them everything is synthetic).
# Leaves: $OUT/records.tar.gz and the shipped arm's weights in pieces of at most 15 MB (cat them together again).
set -euo pipefail
cd "$(dirname "$0")/../.."
minutes=${1:-8}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
venv=/tmp/relook-gpu
if [ ! -x $venv/bin/relook ]; then
    python3 -m venv --system-site-packages $venv
    from_index=$([ -d wheels ] && echo "--no-index --find-links wheels" || true)
    # shellcheck disable=SC2086
    $venv/bin/pip install --quiet --no-deps $from_index -e . || exit 1
    $venv/bin/python -c 'import transformers, accelerate, typer, rich, yaml, pydantic, rapidfuzz, matplotlib' || {
        echo "put the missing packages into ./wheels and give the command again" >&2; exit 2; }
fi
$venv/bin/python -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name())'
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
status=0
$venv/bin/python zoo/tools/receipts_arms.py --scale base --minutes "$minutes" --no-report \
    workers=14 threads=4 stages.talk.samples=48000 stages.instruct.samples=32000 stages.talk.batch=32 stages.instruct.batch=32 ||
    status=$?
runs=runs/receipts-arms-base
[ -d $runs/records ] && tar czf "$OUT/records.tar.gz" -C $runs records
model=$runs/region-s1/final/model.safetensors
[ -f $model ] && split -b 15M -d $model "$OUT/region.safetensors." && cp $runs/region-s1/final/config.json "$OUT/region.config.json"
[ $status = 0 ] && echo done
exit $status
