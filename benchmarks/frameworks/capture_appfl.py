"""APPFL: its trainer on the client, then its compressor there and back, or its secure aggregation's mask.

A run of it needs a Globus account or a configuration of agents around these classes; what is done to an update is here.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from appfl.algorithm.trainer import VanillaTrainer
from appfl.compressor.zfp_compressor import ZFPCompressor
from appfl.privacy import SecureAggregator
from exchange import RATE, Mechanism, Task, keep
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CLIP = {"clip_grad": True, "clip_value": 1, "clip_norm": 1}
PRIVATE = {"use_dp": True, "epsilon": 1, **CLIP}
DP = "clip_grad, clip_value 1, clip_norm 1, ε 1 (its examples)"
ZFP = {"lossless_compressor": "blosc", "error_bounding_mode": "REL", "error_bound": 1e-3, "param_cutoff": 1024}
MECHANISMS = (
    (Mechanism("none", "VanillaTrainer"), {}),
    (Mechanism("none (send_gradient)", "send_gradient true", "before - after"), {"send_gradient": True}),
    (Mechanism("clip_grad", "clip_value 1, clip_norm 1 (its examples)"), CLIP),
    (Mechanism("laplace", DP), {**PRIVATE, "dp_mechanism": "laplace"}),
    (Mechanism("gaussian", DP), {**PRIVATE, "dp_mechanism": "gaussian"}),
    (Mechanism("opacus", "noise_multiplier 1, max_grad_norm 1"), {"use_dp": True, "dp_mechanism": "opacus"}),
    (Mechanism("ZFPCompressor", "REL 1e-3, param_cutoff 1024 (its examples)"), {}),
    (Mechanism("SecureAggregator", "one of two clients, masked", "after - before"), {}),
)
SILENT = SimpleNamespace(**dict.fromkeys(("log_title", "set_title", "log_content", "info", "debug"), lambda *_: None))


def trained(task: Task, options: dict) -> dict[str, Tensor]:
    """What the trainer hands to the communicator after one step on the batch."""
    config = {"mode": "step", "num_local_steps": 1, "optim": "SGD", "optim_args": {"lr": RATE}, "device": "cpu"}
    config |= {"train_batch_size": len(task.images), **options}
    data = TensorDataset(task.images, task.labels)
    parts = task.network(), nn.CrossEntropyLoss(), lambda *_: 0.0, data, None
    trainer = VanillaTrainer(*parts, OmegaConf.create(config), SILENT)
    trainer.train()
    sent = trainer.get_parameters()
    return dict(sent[0] if isinstance(sent, tuple) else sent)


def through(task: Task, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the server has of the weights, by name of the mechanism."""
    if name == "ZFPCompressor":
        compressor = ZFPCompressor(OmegaConf.create(ZFP))
        return compressor.decompress_model(compressor.compress_model(weights), task.network())
    if name == "SecureAggregator":
        mask = SecureAggregator("one", ["one", "two"], b"between the clients", torch.device("cpu"))
        change = {key: weights[key] - task.weights[key] for key in task.weights}
        flat, shapes = mask.mask_update(change, 0)
        return SecureAggregator.unflatten_to_state_dict(flat, shapes, torch.device("cpu"))
    return weights


def capture(path: Path, folder: Path) -> None:
    task = Task.load(path)
    for mechanism, options in MECHANISMS:
        torch.manual_seed(0)
        keep(folder, task, "appfl", mechanism, through(task, mechanism.name, trained(task, options)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    capture(Path(sys.argv[1]), Path(sys.argv[2]))
