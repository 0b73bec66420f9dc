"""Plato: the processors of its clients, each with its inverse on the server's side; the weights pass through them."""

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from exchange import Mechanism, Task, keep

WORK = Path(tempfile.mkdtemp())
(WORK / "config.yml").write_text(
    "clients: {type: simple, total_clients: 1, per_round: 1}\nserver: {address: 127.0.0.1, port: 8000}\n"
    "data: {datasource: MNIST}\ntrainer: {type: basic, rounds: 1, model_name: none}\n"
    "algorithm: {type: fedavg, epsilon: 1}\n"
)
os.environ["config_file"] = str(WORK / "config.yml")  # noqa: SIM112 - its name
arguments, sys.argv = sys.argv[1:], sys.argv[:1]
os.chdir(WORK)  # Plato makes its folders where it is started

from plato.processors import (  # noqa: E402
    model_dequantize,
    model_dequantize_qsgd,
    model_quantize,
    model_quantize_qsgd,
    model_randomized_response,
    structured_pruning,
    unstructured_pruning,
)

QSGD = Mechanism("model_quantize_qsgd", "quantization_level 64", told={"bits": 7})
MECHANISMS = (
    (Mechanism("none", "model_deepcopy"), None, None),
    (Mechanism("model_quantize", "bfloat16"), model_quantize, model_dequantize),
    (QSGD, model_quantize_qsgd, model_dequantize_qsgd),
    (Mechanism("unstructured_pruning", "amount 0.2 of the weights"), unstructured_pruning, None),
    (Mechanism("structured_pruning", "ln, amount 0.2, norm 1, dim -1"), structured_pruning, None),
    (Mechanism("model_randomized_response", "ε 1 (no default)"), model_randomized_response, None),
)


def capture(path: Path, folder: Path) -> None:
    task = Task.load(path)
    for mechanism, outbound, inbound in MECHANISMS:
        torch.manual_seed(0)
        model = task.network()
        model.load_state_dict(task.trained())
        trainer = SimpleNamespace(model=model, device="cpu")
        payload = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        for module in filter(None, (outbound, inbound)):
            payload = module.Processor(client_id=1, trainer=trainer).process(payload)
        keep(folder, task, "plato-learn", mechanism, payload)


if __name__ == "__main__":
    torch.set_num_threads(1)
    capture(Path(arguments[0]), Path(arguments[1]))
