#!/usr/bin/env bash
# bitsandbytes 0.50.2: without a GPU, a 4-bit matrix comes back wrong if its rows do not end where a block of 64 does.
#
# quantize_4bit cuts a tensor into blocks of 64 entries, row after row, and sends one scale for each. On a CPU dequantize_4bit
# counts the blocks of a matrix row by row instead: where a row is no multiple of 64 entries, most blocks get another block's
# scale. The codes and the scales are right: the same bytes, dequantised as one long row, are within the usual rounding.
#
# Seen on CPython 3.11.7, x86-64, with torch 2.14.1 on the CPU, blocks of 64: a normal 80 x 80 matrix comes back with a
# relative error of 0.28 (nf4), as one long row with 0.09; 100 x 128 with 0.09 either way.
# What helps: quantise and dequantise tensor.flatten().
#
# Fails (exit status 1) if the matrix no longer comes back worse than its flattened self.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check bitsandbytes==0.50.2 torch==2.14.1 numpy==2.4.2

cat > "$folder/compare.py" <<'PYTHON'
import sys

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

generator = torch.Generator().manual_seed(0)


def errors(shape: tuple[int, int], kind: str) -> tuple[float, float, bool]:
    """Relative errors of a matrix and of its flattened self, and whether the same bytes were sent for both."""
    matrix = torch.randn(shape, generator=generator)
    found, sent = [], []
    for tensor in (matrix, matrix.flatten()):
        packed, state = quantize_4bit(tensor, quant_type=kind)
        back = dequantize_4bit(packed, quant_state=state).reshape(shape)
        found.append(float((back - matrix).norm() / matrix.norm()))
        sent.append((packed.flatten(), state.absmax))
    return *found, all(torch.equal(a, b) for a, b in zip(*sent, strict=True))


checks = {}
for kind in ("nf4", "fp4"):
    for shape, ends in (((80, 80), False), ((50, 96), False), ((100, 128), True)):
        matrix, flat, same = errors(shape, kind)
        print(f"{kind} {shape[0]} x {shape[1]}: as a matrix {matrix:.3f}, as one row {flat:.3f}, same bytes: {same}")
        checks[f"{kind} {shape}: the same bytes are sent"] = same
        checks[f"{kind} {shape}: one row is within rounding"] = flat < 0.15
        words = "the matrix too" if ends else "the matrix is not"
        checks[f"{kind} {shape}: {words}"] = (matrix < 0.15) == ends
for words, holds in checks.items():
    print(f"{'holds' if holds else 'CHANGED'}: {words}")
sys.exit(not all(checks.values()))
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
