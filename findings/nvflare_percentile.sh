#!/usr/bin/env bash
# nvflare 2.9.0: PercentilePrivacy, made for differences of weights, cuts whole weights at 0.01 by default.
#
# PercentilePrivacy(percentile=10, gamma=0.01) speaks of "weight diff" in each of its parameters: the smallest tenth of the
# entries becomes zero, the others are cut at gamma. It filters two kinds of data by default, WEIGHT_DIFF and WEIGHTS, and
# does the same to both. FULL weights are what a client sends by default: of a model as torch initialises it, most entries
# are larger than 0.01, and each of these arrives as plus or minus 0.01.
# Nor does "Any weight diff with abs<gamma will become 0", its word on gamma, hold: below gamma entries arrive as they are.
#
# Seen on CPython 3.11.7, x86-64: of 400 x 400 weights, uniform in +-0.05 as torch's Linear(400, 400), 80 % arrive as
# +-0.01 and 10 % as 0; of a difference a hundredth of that size 10 % arrive as 0, the other 90 % bit for bit.
# What helps: ConvertWeights("weights_to_diff") before it, or data_kinds=[DataKind.WEIGHT_DIFF].
#
# Fails (exit status 1) if whole weights are no longer filtered by default, or entries below gamma become zero.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check nvflare==2.9.0

cat > "$folder/compare.py" <<'PYTHON'
import sys

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy

gamma = np.float32(0.01)
weights = np.random.default_rng(0).uniform(-0.05, 0.05, (400, 400)).astype(np.float32)
sent = {DataKind.WEIGHTS: weights, DataKind.WEIGHT_DIFF: weights / 100}
received = {}
for kind, data in sent.items():
    message = DXO(kind, {"layer": data.copy()}).to_shareable()
    received[kind] = from_shareable(PercentilePrivacy().process(message, FLContext())).data["layer"]
    cut, zero = np.mean(np.abs(received[kind]) == gamma), np.mean(received[kind] == 0)
    print(f"{kind}: {cut:.0%} arrive as +-0.01, {zero:.0%} as 0, {np.mean(received[kind] == data):.0%} as they are")
whole, change = received[DataKind.WEIGHTS], received[DataKind.WEIGHT_DIFF]
checks = {
    "most of the whole weights arrive as +-0.01": np.mean(np.abs(whole) == gamma) > 0.75,
    "of the difference, all of it below gamma, a tenth becomes zero": abs(np.mean(change == 0) - 0.1) < 0.01,
    "and the others arrive bit for bit": np.mean(change == sent[DataKind.WEIGHT_DIFF]) > 0.89,
}
for words, holds in checks.items():
    print(f"{'holds' if holds else 'CHANGED'}: {words}")
sys.exit(not all(checks.values()))
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
