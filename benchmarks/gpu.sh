#!/usr/bin/env bash
# What needs a GPU, in one command of some minutes: that the fast paths give the plain ones' numbers
# there, and how fast they are. Needs torch, torchvision and timm alone; tests run where pytest is.
# Writes OUT/gpu.json, a list of rows (see compare.py), one list a line.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks}/gpu.json
: >"$out"
failed=0
if python -c 'import pytest' 2>/dev/null; then
    timeout 120 python -m pytest -q -m "not slow" -p no:cacheprovider \
        tests/nfnet/test_standardisation.py tests/nfnet/test_optim.py tests/nfnet/test_agc.py || failed=1
fi
run() {
    timeout 120 python "benchmarks/$1.py" --device cuda --json "${@:2}" | tee -a "$out" || failed=1
}
run optimizer_pass
run step --batch-size 128 --image-size 192 --target 1.3
run step --model nf_resnet50 --batch-size 128 --image-size 224 --target 1.15
run micro_batches --batch-size 256 --image-size 192
run efficientnet --batch-size 16
run nccl --batch-size 32 --image-size 192
exit "$failed"
