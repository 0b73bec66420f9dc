#!/usr/bin/env bash
# torch 2.14.1, CPUs with matrix units for bfloat16: each new shape of a product is compiled before it is computed.
#
# A search whose starts end one by one multiplies (rows, 400) by (400, 1000) with other rows each step. In float32 the
# number of rows does not matter. In bfloat16, where AMX or AVX-512 BF16 makes the product itself faster, oneDNN generates
# machine code for every shape that it has not seen, which takes the time of many products: the cheap type is the slow one.
# torch.backends.mkldnn says nothing of it, profilers count it to aten::mm, and benchmarks that repeat one shape never meet
# it. The cache holds 1024 primitives (ONEDNN_PRIMITIVE_CACHE_CAPACITY), so that a warm process does not show it either.
#
# Seen on CPython 3.11.7, x86-64 with amx_bf16, one thread: 0.62 and 0.56 ms in float32, new and known; 6.7
# and 0.21 ms in bfloat16, 31.7 times; 81 products compiled for 81 shapes.
# What helps: fill the rows up to a multiple of 16, so that few shapes occur.
#
# Fails (exit status 1) if new shapes are no longer compiled, or cost less than thrice a product of a known shape. Without
# such units there is nothing to see; it says so and ends with status 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.2

cat > "$folder/shapes.py" <<'PYTHON'
import os
import statistics
import sys
import time

import torch

able = torch.cpu.get_capabilities()
if not any(able.get(unit) for unit in ("amx_bf16", "avx512_bf16")):
    print("no matrix units for bfloat16 here: nothing to see")
    sys.exit(0)
torch.set_num_threads(1)
w, x = torch.randn(400, 1000), torch.randn(200, 400)


def median(of, rows):
    spent = []
    for k in rows:
        part = x[:k].to(of.dtype)
        start = time.perf_counter()
        part @ of
        spent.append(time.perf_counter() - start)
    return 1000 * statistics.median(spent)


for dtype in (torch.float32, torch.bfloat16):
    of = w.to(dtype)
    median(of, [200])
    first, again = median(of, range(101, 181)), median(of, range(101, 181))
    print(f"{dtype}: {first:.2f} ms when a number of rows is new, {again:.2f} ms when it is not", flush=True)
    print(f"ratio {dtype} {first / again:.1f}")
PYTHON

cd "$folder"
OMP_NUM_THREADS=1 ONEDNN_VERBOSE=profile_create venv/bin/python shapes.py > said.txt
grep -v "^onednn_verbose" said.txt
if grep -q "nothing to see" said.txt; then exit 0; fi
compiled=$(grep -c "create:cache_miss.*matmul" said.txt || true)
echo "$compiled matmuls compiled"
ratio=$(sed -n 's/^ratio torch.bfloat16 //p' said.txt)
plain=$(sed -n 's/^ratio torch.float32 //p' said.txt)
awk -v n="$compiled" -v r="$ratio" -v p="$plain" 'BEGIN { exit !(n >= 80 && r > 3 && p < 2) }'
