#!/usr/bin/env bash
# torch 2.14.1: of all activations hardsigmoid alone has no second derivative; torchvision's MobileNetV3 is built on it.
#
# Gradient matching (DLG, Inverting Gradients), gradient penalties and Hessian products differentiate a gradient. Every
# activation of torch.nn can be differentiated twice, the piecewise linear ones too (their second derivative is zero), and
# Hardswish since 2023. Hardsigmoid has a backward of its own that autograd cannot differentiate, and raises. So a MobileNetV3,
# whose squeeze-and-excitation blocks use it, looks safe from gradient matching because the attack stops with an error.
#
# Seen on CPython 3.11.7, x86-64, torchvision 0.29.1: of the activations that can be made without arguments Hardsigmoid raises,
# no other; mobilenet_v3_small has 9 of it, and a penalty on its gradient raises in training and in evaluation mode. Forward
# mode over the gradient (torch.func.jvp of torch.func.grad) raises as well.
# What helps: put (x / 6 + 1 / 2).clamp(0, 1) in its place, which has the same values and gradients, and further derivatives.
#
# Fails (exit status 1) if another activation lacks its second derivative, or Hardsigmoid has one.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 numpy==2.4.2

cat > "$folder/compare.py" <<'PYTHON'
import inspect
import sys
import warnings

import torch
import torchvision
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(2, 4, 6, dtype=torch.float64)


def twice(function, at):
    at = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(at).square().sum(), at, create_graph=True)
    return torch.autograd.grad(slope.sum(), at)[0]


def made():
    for name, kind in inspect.getmembers(nn.modules.activation, inspect.isclass):
        if issubclass(kind, nn.Module) and kind.__module__ == nn.modules.activation.__name__:
            if all(p.default is not p.empty for p in inspect.signature(kind).parameters.values()):
                yield name, kind().double()


done, lacking = [], []
for name, module in made():
    try:
        module(x)
    except (RuntimeError, IndexError):  # attention and the like take other inputs
        continue
    try:
        twice(module, x)
        done.append(name)
    except RuntimeError as error:
        lacking.append(name)
        print(f"{name}: {error}")
print(f"{len(done)} activations have a second derivative; without one: {', '.join(lacking) or 'none'}")

f, same = nn.functional.hardsigmoid, lambda z: (z / 6 + 0.5).clamp(0, 1)
first = [torch.func.grad(lambda z, g=g: g(z).square().sum())(x) for g in (f, same)]
agree = torch.allclose(*first) and bool(twice(same, x).isfinite().all())
print(f"the clamped line has the same gradient, and a second: {agree}")
try:
    torch.func.jvp(torch.func.grad(lambda z: f(z).square().sum()), (x,), (torch.ones_like(x),))
    forward = True
except (RuntimeError, NotImplementedError):
    forward = False
print(f"forward mode over the gradient works: {forward}")

model, raised = torchvision.models.mobilenet_v3_small(weights=None), []
print(f"Hardsigmoid in mobilenet_v3_small: {sum(isinstance(m, nn.Hardsigmoid) for m in model.modules())}")
for mode in (True, False):
    try:
        twice(model.train(mode), torch.randn(2, 3, 64, 64))
    except RuntimeError:
        raised.append(mode)
as_seen = lacking == ["Hardsigmoid"] and agree and not forward and raised == [True, False]
print("as seen" if as_seen else f"CHANGED: {lacking}, {forward}, {raised}")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/compare.py"
