"""declearn: a server and a client in processes of their own, by websockets on loopback; one federation a mechanism."""

import os
import socket
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from declearn.aggregator import AveragingAggregator, ModelUpdates
from declearn.communication import NetworkClientConfig, NetworkServerConfig
from declearn.dataset.torch import TorchDataset
from declearn.main import FederatedClient, FederatedServer
from declearn.main.config import FLOptimConfig, FLRunConfig
from declearn.model.api import Vector
from declearn.model.torch import TorchModel
from exchange import RATE, Mechanism, Task, keep
from torch import nn
from torch.utils.data import TensorDataset

STEP = "before - after"
MECHANISMS = (
    (Mechanism("none", "averaging", STEP), []),
    (Mechanism("l2-clipping", "max_norm 1, each tensor", STEP), ["l2-clipping"]),
    (Mechanism("l2-global-clipping", "max_norm 1", STEP), ["l2-global-clipping"]),
    (Mechanism("gaussian-noise", "std 1", STEP, {"noise": 1.0}), [("gaussian-noise", {"safe_mode": False, "seed": 0})]),
    (Mechanism("DP-SGD", "sclip_norm 1, ε 3, δ 1e-5, by opacus (no defaults)", STEP), None),
)
PRIVACY = {"budget": (3.0, 1e-5), "sclip_norm": 1.0}


class Keeping(AveragingAggregator):
    """Averages, and writes down what a client sent: weights before the step, less those after it."""

    name = "keeping"

    def finalize_updates(self, updates: ModelUpdates) -> Vector:
        task, (mechanism, _) = Task.load(Path(os.environ["TASK"])), MECHANISMS[int(os.environ["MECHANISM"])]
        received = super().finalize_updates(updates)
        keep(Path(os.environ["KEEP"]), task, "declearn", mechanism, received.coefs)
        return received


def serve(task: Task, number: int, port: int) -> None:
    network = NetworkServerConfig(protocol="websockets", host="127.0.0.1", port=port)
    modules = MECHANISMS[number][1]
    client = {"lrate": RATE, "modules": modules or []}
    optim = FLOptimConfig.from_params(aggregator=Keeping(), client_opt=client, server_opt=1.0)
    layers = OrderedDict(list(task.network().named_children())[1:])  # DP-SGD hands single samples on: they come flat
    model = TorchModel(nn.Sequential(layers), nn.CrossEntropyLoss())
    server = FederatedServer(model, network, optim, checkpoint=None)
    training = {"batch_size": len(task.images), "n_steps": 1, "n_epoch": 1}
    privacy = {"privacy": PRIVACY} if modules is None else {}
    evaluate = {"batch_size": len(task.images)}
    register = {"min_clients": 1, "max_clients": 1, "timeout": 60}
    config = FLRunConfig.from_params(rounds=1, register=register, training=training, evaluate=evaluate, **privacy)
    server.run(config)


def join(task: Task, port: int) -> None:
    network = NetworkClientConfig(protocol="websockets", server_uri=f"ws://127.0.0.1:{port}", name="one")
    data = TorchDataset(TensorDataset(task.images.flatten(1), task.labels))
    FederatedClient(network, data, valid_data=data, checkpoint=tempfile.mkdtemp()).run()


def capture(path: Path, folder: Path) -> None:
    for number in range(len(MECHANISMS)):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "TASK": str(path), "KEEP": str(folder), "MECHANISM": str(number)}
        roles = [[sys.executable, __file__, role, str(number), str(port)] for role in ("server", "client")]
        with (folder / f"{path.stem}-{number}.log").open("w") as log:
            both = [subprocess.Popen(role, env=environment, stdout=log, stderr=log) for role in roles]
            try:
                ends = [process.wait(300) for process in reversed(both)]
            finally:
                for process in both:
                    process.kill()
        if any(ends):
            raise SystemExit(f"declearn, mechanism {number}: see {log.name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] in ("server", "client"):
        role, number, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        task = Task.load(Path(os.environ["TASK"]))
        serve(task, number, port) if role == "server" else join(task, port)
    else:
        capture(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
