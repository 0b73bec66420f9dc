"""An update that is much larger than what the attack needs of it stays on disk."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spear import federated

SHAPE, WIDTHS, BATCH = (24576,), (2048, 40, 5), 3

# Prints how much the process's own memory grew at most while the attack ran, in bytes; mapped files do not count, nor
# does what an attack imports.
SCRIPT = """
import json, sys, threading
import torch, spear
import spear.models.tensors
from test_large_updates import network

torch.set_num_threads(1)

def own():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        seen.append(own())

small = torch.nn.Sequential(torch.nn.Linear(9, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
for method in ("sampling", "network"):
    spear.attack(small, spear.federated.gradient(small, torch.randn(3, 9), torch.arange(3)), method=method)
model = network()
tensors, _ = spear.models.tensors.read_tensors(sys.argv[1])
model.load_state_dict(tensors, assign=True)
start, done, seen = own(), threading.Event(), []
thread = threading.Thread(target=watch, daemon=True)
thread.start()
options = {"method": sys.argv[3], "layer": sys.argv[4] or None}
result = spear.attack(model, spear.SharedUpdate.load(sys.argv[2]), **options)
done.set(); thread.join()
print(json.dumps({"grown": max(seen) - start, "certified": int(result.certified.sum()), "reason": result.reason}))
"""


def network() -> torch.nn.Sequential:
    """A network whose first layer holds almost everything; without memory for its parameters."""
    sizes, layers = (*SHAPE, *WIDTHS), []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(inputs, outputs, device="meta"), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc: Linux only")
def test_no_layer_is_held_in_memory_large_or_small(tmp_path: Path, repository: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model, update, weights = network(), tmp_path / "update.safetensors", tmp_path / "weights.safetensors"
    values = {
        name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 for name, p in model.named_parameters()
    }
    save_file(values, weights)
    model.load_state_dict(values, assign=True)
    model.requires_grad_(True)
    inputs = torch.randn(BATCH, *SHAPE, generator=generator)
    federated.gradient(model, inputs, torch.arange(BATCH)).save(update)
    size = update.stat().st_size
    assert size > 2e8
    del model, values
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(repository), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
    }
    for method, layer, share in (("sampling", "0", 1.0), ("sampling", "2", 0.5), ("network", "", 1.0)):
        command = [sys.executable, "-c", SCRIPT, str(weights), str(update), method, layer]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        figures = json.loads(ran.stdout)
        assert figures["certified"] == BATCH, figures
        assert figures["grown"] < share * size, figures
