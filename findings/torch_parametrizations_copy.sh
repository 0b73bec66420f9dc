#!/usr/bin/env bash
# torch 2.14.1: remove_parametrizations on a deep copy of a module breaks the module that was copied.
#
# torch.nn.utils.parametrize puts a computed weight on a module as a property of a class made for that module. copy.deepcopy
# copies parameters and buffers, and leaves the class: copy and original share it. remove_parametrizations then deletes the
# property from the class. The copy is well afterwards, a plain layer; the original has lost its weight, and its next forward
# raises AttributeError. Anybody who bakes a copy (to export it, to count its parameters, to audit it) breaks what goes on
# training.
#
# Seen on CPython 3.11.7, x86-64, for weight_norm, spectral_norm and orthogonal, parametrized and copied by copy.deepcopy: after
# the removal on the copy the original raises in all three; a second copy, too; a module made by the constructor does not.
# What helps: load the computed weights into a plain module, or read them off, and leave the parametrization where it is.
#
# Fails (exit status 1) if the original still works after the removal on its copy, or did not before.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.2

cat > "$folder/compare.py" <<'PYTHON'
import copy
import sys

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize


def works(layer: nn.Module) -> bool:
    try:
        layer(torch.ones(2, 6))
    except AttributeError as error:
        print(f"    {error}")
        return False
    return True


seen = []
for make in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
    original = make(nn.Linear(6, 4)).eval()
    first, second, apart = copy.deepcopy(original), copy.deepcopy(original), make(nn.Linear(6, 4)).eval()
    before = works(original)
    parametrize.remove_parametrizations(first, "weight", leave_parametrized=True)
    after = [works(layer) for layer in (first, original, second, apart)]
    print(f"{make.__name__}: the original works before: {before}; after: the copy, the original, a second copy, another: {after}")
    seen.append([before, *after])
expected = [[True, True, False, False, True]] * 3
print("as seen" if seen == expected else f"CHANGED: expected {expected}")
sys.exit(seen != expected)
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
