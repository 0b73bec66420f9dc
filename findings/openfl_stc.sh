#!/usr/bin/env bash
# openfl 1.9: sparse ternary compression sends a tenth of each value that it keeps.
#
# STCPipeline keeps the largest tenth of a tensor's entries (p_sparsity 0.1, its default) and sends each as plus or minus one
# value. Sparse ternary compression (Sattler et al. 2019, Algorithm 1) takes for it the mean magnitude of the entries that it
# keeps. OpenFL takes the mean over the tensor, zeros included (the zeros are put in before the mean is taken), which is
# p_sparsity times that: the aggregator adds a tenth of the update.
#
# Seen on CPython 3.11.7, x86-64, with NumPy 2.0.2: of a tensor of 120,000 normal entries a tenth arrives, as one value of
# either sign; that value is 0.1000 of the kept entries' mean magnitude.
# What helps: divide what arrives by p_sparsity.
#
# Fails (exit status 1) if the value is no longer p_sparsity times the mean of what is kept.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openfl==1.9 numpy==2.0.2

cat > "$folder/compare.py" <<'PYTHON'
import sys

import numpy as np
from openfl.pipelines import STCPipeline

sparsity = 0.1
data = np.random.default_rng(0).normal(0, 1e-3, (400, 300)).astype(np.float32)
pipeline = STCPipeline()  # p_sparsity is 0.1 by default
received = pipeline.backward(*pipeline.forward(data))
kept = np.abs(data[received != 0])
value = np.unique(np.abs(received[received != 0]))
print(f"entries that arrive: {len(kept) / data.size:.2%}, as {len(value)} magnitude: {value[0]:.6f}")
print(f"mean magnitude of those entries: {kept.mean():.6f}; ratio {value[0] / kept.mean():.4f}")
checks = {
    "a tenth of the entries arrives": abs(len(kept) / data.size - sparsity) < 1e-3,
    "all with one magnitude": len(value) == 1,
    "they are the largest": kept.min() >= np.abs(data[received == 0]).max(),
    "that magnitude is p_sparsity times their mean": abs(value[0] / kept.mean() - sparsity) < 1e-3 * sparsity,
}
for words, holds in checks.items():
    print(f"{'holds' if holds else 'CHANGED'}: {words}")
sys.exit(not all(checks.values()))
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
