#!/usr/bin/env bash
# torch 2.14.1, Flax 0.12.6, Keras 3.15.1: batch normalisation keeps a running variance over b - 1 in torch, over b in the others.
#
# All three normalise a batch by its variance over b. Into the running variance torch puts the one over b - 1, Flax (linen and
# nnx) and Keras the same over b, Keras on its torch backend, too. The layers, their momentum and their buffers are otherwise
# equal, so that a state which is converted, or averaged over clients of two frameworks, loads without a word: with batches of
# 4 a channel's variance is 33 % larger from torch than from the others. Who reads a batch's own statistics off a client's
# buffers must know which it was: samples come out at the wrong scale, by 15 % at 4 samples, 3 % at 16, with nothing else amiss.
#
# Seen on CPython 3.11.7, x86-64, jax 0.8.3: after one step at momentum 0.9 (0.1 in torch) from a variance of 1 on 4 samples, what
# was put in is 1.333 times the variance over b in torch, 1.000 times it in Flax linen, Flax nnx, Keras on jax and Keras on torch.
# What helps: ask the layer's epsilon, which shows in the batch's gradient, or convert buffers by 1 - 1/b (b times the pixels).
#
# Fails (exit status 1) if torch no longer uses b - 1, or one of the others no longer b.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME KERAS_BACKEND
export JAX_PLATFORMS=cpu KERAS_HOME="$folder/keras" TF_CPP_MIN_LOG_LEVEL=3

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 flax==0.12.6 keras==3.15.1 jax==0.8.3 numpy==2.4.6

cat > "$folder/variance.py" <<'PYTHON'
import sys

import numpy as np

x = np.random.default_rng(0).normal(size=(4, 5)).astype("float32")


def by_torch():
    import torch

    layer = torch.nn.BatchNorm1d(5, momentum=0.1).train()
    layer(torch.from_numpy(x))
    return layer.running_var.numpy()


def by_linen():
    import jax
    from flax import linen

    layer = linen.BatchNorm(use_running_average=False, momentum=0.9)
    state = layer.init(jax.random.key(0), x)
    return layer.apply(state, x, mutable=["batch_stats"])[1]["batch_stats"]["var"]


def by_nnx():
    from flax import nnx

    layer = nnx.BatchNorm(5, momentum=0.9, use_running_average=False, rngs=nnx.Rngs(0))
    layer(x)
    return layer.var[...]


def by_keras():
    import keras

    layer = keras.layers.BatchNormalization(momentum=0.9)
    layer(x, training=True)
    return keras.ops.convert_to_numpy(layer.moving_variance)


made = {"torch": by_torch, "linen": by_linen, "nnx": by_nnx, "keras": by_keras}[sys.argv[1]]()
print(round(float(((np.asarray(made) - 0.9) / 0.1 / x.var(0)).mean()), 3))
PYTHON

status=0
seen() {
  local share
  share=$(KERAS_BACKEND=$3 "$folder/venv/bin/python" "$folder/variance.py" "$2")
  echo "$1: the running variance takes $share times a batch's variance over its 4 samples (expected $4)"
  [ "$share" = "$4" ] || status=1
}
seen torch torch jax 1.333
seen "Flax linen" linen jax 1.0
seen "Flax nnx" nnx jax 1.0
seen "Keras on jax" keras jax 1.0
seen "Keras on torch" keras torch 1.0
exit $status
