"""Networks that normalise while they train, read from their graph: what stands between their linear layers.

BatchNorm that takes the batch's own statistics is known by its module or its function; normalisation of each sample
(LayerNorm, RMSNorm, GroupNorm of one group, or the same written by hand) by trying what it computes.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from spear.models.entrywise import Piece, find, is_log_softmax, relu_then
from spear.models.graphs import extract
from spear.models.layers import Path, Shape
from spear.models.modes import NORMALISATIONS, mode, modes, words
from spear.models.traced import Traced, operation
from spear.models.tracing import LONGEST, _cuts, _outputs, _path, _source, _traced
from spear.reconstruction import Refusal

WANTED = "batch normalisation in training mode is attacked in a chain of Linear, normalisation, ReLU"
