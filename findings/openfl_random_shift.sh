#!/usr/bin/env bash
# openfl 1.9: RandomShiftPipeline calls itself lossless, and hardly an entry comes back as it was.
#
# The pipeline adds a random number between -20 and 20 to each entry, in float32, and takes it away again on the other side.
# At that size float32 has steps of up to 1.9e-6, so a change of weights of about 1e-3 loses all but three of its digits.
# `is_lossy()` is False, so the codec also takes it for what must arrive exactly (`require_lossless=True`: whole weights,
# metrics). The random numbers travel beside the entries that they were added to, in the message's metadata.
#
# Seen on CPython 3.11.7, x86-64, with NumPy 2.0.2: of 120,000 normal entries of standard deviation 1e-3 0.04 % come back
# equal; the largest error is 9.5e-7, the median relative error 2.4e-4.
# What helps: NoCompressionPipeline.
#
# Fails (exit status 1) if the pipeline calls itself lossy, or most entries come back equal.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openfl==1.9 numpy==2.0.2

cat > "$folder/compare.py" <<'PYTHON'
import sys

import numpy as np
from openfl.pipelines import RandomShiftPipeline

np.random.seed(0)  # what the pipeline draws from
data = np.random.default_rng(0).normal(0, 1e-3, (400, 300)).astype(np.float32)
pipeline = RandomShiftPipeline()
received = pipeline.backward(*pipeline.forward(data))
error = np.abs(received - data)
print(f"is_lossy() is {pipeline.is_lossy()}; {np.mean(received == data):.2%} of the entries come back equal")
print(f"largest error {error.max():.1e}, median relative error {np.median(error / np.abs(data)):.1e}")
checks = {
    "it calls itself lossless": not pipeline.is_lossy(),
    "fewer than one entry in a hundred comes back equal": np.mean(received == data) < 0.01,
    "half of them are off by more than a ten-thousandth": np.median(error / np.abs(data)) > 1e-4,
}
for words, holds in checks.items():
    print(f"{'holds' if holds else 'CHANGED'}: {words}")
sys.exit(not all(checks.values()))
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
