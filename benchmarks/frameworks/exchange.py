"""What the runner and a framework's own processes hand to each other, as safetensors: a task, and updates as received.

Runs in the framework's environment, so it needs torch and safetensors only.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RATE = 0.1  # of the one step of SGD that every client takes
SENDS = ("weights", "after - before", "before - after")


def network(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Three linear layers with ReLU between them, of the shapes and values that `weights` has under fc1, fc2, fc3."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for name in ("fc1", "fc2", "fc3"):
        outputs, inputs = weights[f"{name}.weight"].shape
        layers[name] = nn.Linear(inputs, outputs)
        if name != "fc3":
            layers[f"relu{name[-1]}"] = nn.ReLU()
    model = nn.Sequential(layers)
    model.load_state_dict(dict(weights))
    return model


@dataclass(frozen=True)
class Task:
    """A client's batch (images (b, C, H, W) in float32, labels (b,)) and the weights that the server sent it."""

    name: str
    weights: dict[str, Tensor]
    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls, path: Path) -> "Task":
        tensors = load_file(path)
        images, labels = tensors.pop("images"), tensors.pop("labels")
        return cls(path.stem, dict(network(tensors).state_dict()), images, labels)  # in the network's order

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name}.safetensors"
        save_file({"images": self.images, "labels": self.labels, **self.weights}, path)
        return path

    def network(self) -> nn.Sequential:
        """The server's network, as the client received it."""
        return network(self.weights)

    def trained(self) -> dict[str, Tensor]:
        """The weights after one step of SGD on the batch: for frameworks that leave the loop to the user."""
        model = self.network()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        nn.functional.cross_entropy(model(self.images), self.labels).backward()
        optimizer.step()
        return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@dataclass(frozen=True)
class Mechanism:
    """What stands between the client's step and the server's memory.

    `settings` are its options in words: the package's own defaults, or where it has none what its documentation shows.
    `sends` says what the tensors are, one of `SENDS`: the weights after the step, or their change. `told` is what a
    server that runs this mechanism knows of it, as arguments of `SharedUpdate.disclosing`.
    """

    name: str
    settings: str
    sends: str = "weights"
    told: dict[str, object] = field(default_factory=dict)


def keep(
    folder: Path, task: Task, package: str, mechanism: Mechanism, received: Mapping[str, Tensor | np.ndarray]
) -> None:
    """Write an update as the server received it, beside what is known of how it came."""
    if mechanism.sends not in SENDS:
        raise ValueError(f"{mechanism.name} sends {mechanism.sends!r}: use one of {', '.join(SENDS)}")
    tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in received.items()}
    words = {**asdict(mechanism), "mechanism": mechanism.name, "task": task.name}
    words |= {"package": package, "version": version(package)}
    path = folder / f"{task.name}-{re.sub(r'[^A-Za-z0-9]+', '_', mechanism.name).strip('_')}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"about": json.dumps(words)})


def about(path: Path) -> dict:
    """What is known of an update beside its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])
