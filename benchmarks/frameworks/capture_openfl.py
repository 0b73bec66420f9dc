"""OpenFL: its collaborator's encoding of trained tensors, its aggregator's decoding, and the message's bytes between.

A federation of OpenFL needs certificates and a plan; what it does to an update is in these two methods, its tensor
codec and the pipelines, which run here as they are.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from exchange import Mechanism, Task, keep
from openfl.component.aggregator.aggregator import Aggregator
from openfl.component.collaborator.collaborator import Collaborator
from openfl.databases import TensorDB
from openfl.pipelines import (
    EdenPipeline,
    KCPipeline,
    NoCompressionPipeline,
    RandomShiftPipeline,
    SKCPipeline,
    STCPipeline,
    TensorCodec,
)
from openfl.protocols import base_pb2
from openfl.utilities import TensorKey

NAME, ROUND, HOST = "one", 0, "aggregator_of_one"
MECHANISMS = (
    (Mechanism("none", "use_delta_updates, the plan's default"), NoCompressionPipeline),
    (Mechanism("RandomShiftPipeline", "no options"), RandomShiftPipeline),
    (Mechanism("EdenPipeline", "n_bits 8, dim_threshold 100", told={"bits": 8}), EdenPipeline),
    (Mechanism("KCPipeline", "n_clusters 6", told={"bits": 3}), KCPipeline),
    (Mechanism("SKCPipeline", "p_sparsity 0.1, n_clusters 6", told={"bits": 3, "pruning": "top-k"}), SKCPipeline),
    (Mechanism("STCPipeline", "p_sparsity 0.1", told={"bits": 2, "pruning": "top-k"}), STCPipeline),
)


def side(kind: Callable, task: Task) -> SimpleNamespace:
    """What the two methods use of a collaborator or an aggregator: its codec, and the model that it starts from."""
    database = TensorDB()
    for origin in (NAME, HOST):
        keys = {name: TensorKey(name, origin, ROUND, False, ("model",)) for name in task.weights}
        database.cache_tensor({keys[name]: weight.numpy() for name, weight in task.weights.items()})
    return SimpleNamespace(tensor_db=database, tensor_codec=TensorCodec(kind()), uuid=HOST, use_delta_updates=True)


def sent(collaborator: SimpleNamespace, name: str, trained: np.ndarray) -> bytes:
    """The message that a collaborator makes of one trained tensor."""
    key = TensorKey(name, NAME, ROUND, False, ("trained",))
    return Collaborator.nparray_to_named_tensor(collaborator, key, trained).SerializeToString()


def received(aggregator: SimpleNamespace, message: bytes) -> np.ndarray:
    """The tensor that the aggregator stores: the weights, base and decoded change together."""
    tensor = base_pb2.NamedTensor.FromString(message)
    return Aggregator._process_named_tensor(aggregator, tensor, NAME)[1]


def capture(path: Path, folder: Path) -> None:
    task = Task.load(path)
    trained = task.trained()
    for mechanism, kind in MECHANISMS:
        np.random.seed(0)  # noqa: NPY002 - the one that the pipelines draw from
        collaborator, aggregator = side(kind, task), side(kind, task)
        messages = {name: sent(collaborator, name, weight.numpy()) for name, weight in trained.items()}
        stored = {name: received(aggregator, message) for name, message in messages.items()}
        keep(folder, task, "openfl", mechanism, stored)


if __name__ == "__main__":
    torch.set_num_threads(1)
    capture(Path(sys.argv[1]), Path(sys.argv[2]))
