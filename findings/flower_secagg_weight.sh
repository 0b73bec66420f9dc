#!/usr/bin/env bash
# flwr 1.42.0: under SecAgg+ a client's number of examples decides how its weights are rounded and where they are cut.
#
# SecAggPlusWorkflow documents clipping_range (8.0) as the bound of each model parameter and quantization_range (2**22) as
# the levels between: weights within 8 in steps of 4e-6. But secaggplus_mod first multiplies the weights by
# num_examples / max_weight (1000 by default), and divides by it again at the end. So in the model's own units the step is
# 0.0038 / num_examples, and the bound is 8000 / num_examples. A client of 16 examples has its weights rounded to 2.4e-4, more
# than a small step of training moves them. With 10,000 examples a client nothing above 0.8 arrives: the ones of a
# normalisation layer come out as 0.8, with 60,000 (all of MNIST) as 0.133. The clients then log a "potential overflow", but
# nothing overflows: their weights are cut, and the round succeeds.
#
# Seen on CPython 3.11.7, x86-64, with NumPy 2.4.6, three clients with the same 100,064 weights, each in Flower's own classes:
# of 16, 100, 1,000 examples, weights of 0.05 are off by up to 2e-4, 4e-5, 4e-6; of 10,000 and 60,000 a weight of 1 arrives
# as 0.800 and 0.133.
# What helps: max_weight, the largest number of examples of any client, and quantization_range as large as modulus_range over
# the number of clients allows.
#
# Fails (exit status 1) if the error no longer shrinks with the examples, or weights are no longer cut at 8000 / num_examples.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONHOME
export FLWR_TELEMETRY_ENABLED=0

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check flwr==1.42.0 numpy==2.4.6

cat > "$folder/round.py" <<'PYTHON'
import copy
import logging
import sys
from types import SimpleNamespace

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    fitres_to_recorddict,
    parameters_to_arrayrecord,
)
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

NODES = (1, 2, 3)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 9
logging.getLogger("flwr").setLevel(logging.ERROR)


def context(node):
    return Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={})


class Room(Grid):
    """Server and clients in one process: each message passes Flower's mod on its way to the client."""

    run = property(lambda self: SimpleNamespace(run_id=0))
    set_run = create_message = push_messages = pull_messages = lambda self, *a, **k: None

    def __init__(self, weights, examples):
        self.weights, self.examples = weights, examples
        self.contexts = {node: context(node) for node in NODES}

    def get_node_ids(self):
        return NODES

    def train(self, message, _):
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(self.weights), self.examples, {})
        return Message(fitres_to_recorddict(result, False), reply_to=message)

    def send_and_receive(self, messages, *, timeout=None):
        sent = ((message.metadata.dst_node_id, copy.deepcopy(message)) for message in messages)
        return [secaggplus_mod(message, self.contexts[node], self.train) for node, message in sent]


def aggregated(weights, examples):
    room, clients, start = Room(weights, examples), SimpleClientManager(), ndarrays_to_parameters(weights)
    for node in NODES:
        clients.register(GridClientProxy(node, room, 0))
    strategy = FedAvg(min_fit_clients=len(NODES), min_available_clients=len(NODES))
    server = LegacyContext(context(9), ServerConfig(1), strategy, clients)
    server.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({"current_round": 1})
    server.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(start, True)
    SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)(room, server)
    return parameters_to_ndarrays(arrayrecord_to_parameters(server.state.array_records[MAIN_PARAMS_RECORD], True))


linear, ones = np.random.default_rng(0).normal(0, 0.05, 100_000).astype(np.float32), np.ones(64, np.float32)
off, one = {}, {}
for examples in (16, 100, 1_000, 10_000, 60_000):
    received = aggregated([linear, ones], examples)
    off[examples], one[examples] = float(np.abs(received[0] - linear).max()), float(received[1].mean())
    print(f"{examples:6,} examples a client: weights of 0.05 off by up to {off[examples]:.1e}, 1 arrives as {one[examples]:.3f}")
checks = {
    "with up to 1,000 examples the error is a step of 0.0038 / examples": all(
        0.3 < off[n] / (16 / 2**22 * 1000 / n) < 1 for n in (16, 100, 1_000)
    ),
    "and nothing is cut": all(abs(one[n] - 1) < 1e-3 for n in (16, 100, 1_000)),
    "with more, a weight is cut at 8000 / examples": all(abs(one[n] - 8000 / n) < 1e-3 for n in (10_000, 60_000)),
}
for words, holds in checks.items():
    print(f"{'holds' if holds else 'CHANGED'}: {words}")
sys.exit(not all(checks.values()))
PYTHON
"$folder/venv/bin/python" "$folder/round.py"
