#!/usr/bin/env bash
# Fails on a worker whose GPU cannot be used: it must not train on its CPU at a GPU's price.
set -euo pipefail
~/nflab/.venv/bin/python - <<'END'
import torch

if not torch.cuda.is_available():
    raise SystemExit("error: PyTorch finds no GPU here; choose an image with NVIDIA's driver")
END
