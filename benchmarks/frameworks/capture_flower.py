"""Flower: a SuperLink, a SuperNode and the two apps in processes of their own, by `flwr run` on loopback.

One round for each mechanism: the server says in the message's config which mod the client's reply goes through. Secure
aggregation needs three clients: the batch is dealt out to them, and Flower's workflow and mod talk in one process.
"""

import copy
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from exchange import Mechanism, Task, keep
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import (
    arrayrecord_to_parameters,
    fitres_to_recorddict,
    parameters_to_arrayrecord,
)
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server import strategy as legacy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM
from flwr.supercore.task_identity import TaskIdentity

NONE = Mechanism("none", "FedAvg")
FIXED = Mechanism("fixed clipping", "clipping norm 0.1 (no default; that of adaptive clipping)")
ADAPTIVE = Mechanism("adaptive clipping", "initial clipping norm 0.1")
LOCAL = Mechanism("LocalDpMod", "clipping norm 1, sensitivity 1, ε 1, δ 1e-5 (no defaults)")
MODS = {FIXED.name: fixedclipping_mod, ADAPTIVE.name: adaptiveclipping_mod, LOCAL.name: LocalDpMod(1.0, 1.0, 1.0, 1e-5)}
MECHANISMS = (NONE, FIXED, ADAPTIVE, LOCAL)
CLIENTS = (1, 2, 3)  # of secure aggregation
SECURE = (
    (Mechanism("SecAgg+", "batch over three clients, max_weight 1000 (default)"), 1000.0),
    (Mechanism("SecAgg+ (max_weight)", "batch over three clients, max_weight the largest share"), None),
)
PROJECT = """
[project]
name = "one-step"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "none"
[tool.flwr.app.components]
serverapp = "capture_flower:server"
clientapp = "capture_flower:client"
"""
LINK = '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'


def by_name(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The mod that the server's message names."""
    mod = MODS.get(str(message.content["config"]["mechanism"]))
    return call_next(message, context) if mod is None else mod(message, context, call_next)


client = ClientApp(mods=[by_name])  # `flwr run` looks for these two assignments
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    task = Task.load(Path(os.environ["TASK"]))
    content = {
        "arrays": ArrayRecord(task.trained()),
        "metrics": MetricRecord({"num-examples": len(task.images)}),
    }
    return Message(content=RecordDict(content), reply_to=message)


class Keeping(FedAvg):
    """FedAvg that writes down what it receives, and always sends the first weights."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        config["mechanism"], config[KEY_CLIPPING_NORM] = MECHANISMS[server_round - 1].name, 0.1
        first = ArrayRecord(Task.load(Path(os.environ["TASK"])).weights)
        return list(super().configure_train(server_round, first, config, grid))

    def aggregate_train(self, server_round: int, replies: list[Message]) -> tuple:
        (reply,) = replies = list(replies)
        received = reply.content["arrays"].to_torch_state_dict()
        folder, task = Path(os.environ["KEEP"]), Task.load(Path(os.environ["TASK"]))
        keep(folder, task, "flwr", MECHANISMS[server_round - 1], received)
        return super().aggregate_train(server_round, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Keeping(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    weights = ArrayRecord(Task.load(Path(os.environ["TASK"])).weights)
    strategy.start(grid=grid, initial_arrays=weights, num_rounds=len(MECHANISMS))


def capture(path: Path, folder: Path) -> None:
    """Start server and client, run the app on the task of a file, and end both."""
    work = folder / "app"
    work.mkdir(exist_ok=True)
    for file in (Path(__file__), Path(__file__).with_name("exchange.py")):
        shutil.copy(file, work)
    (work / "pyproject.toml").write_text(PROJECT)
    link, node = free_port(), free_port()
    (folder / "config.toml").write_text(LINK.format(port=link))
    bin = Path(sys.executable).parent
    environment = {**os.environ, "TASK": str(path), "KEEP": str(folder), "FLWR_HOME": str(folder)}
    environment |= {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "FLWR_TELEMETRY_ENABLED": "0"}
    commands = (
        ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(link)],
        ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(node)],
    )
    started = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.log").open("w")
            started.append(subprocess.Popen([bin / command[0], *command[1:]], env=environment, stdout=log, stderr=log))
            time.sleep(5)
        run = [bin / "flwr", "run", str(work), "here", "--stream"]
        with (folder / "flwr-run.log").open("w") as log:
            subprocess.run(run, env=environment, stdout=log, stderr=log, timeout=300, check=True)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)


class Room(Grid):
    """Server and clients in one process: each message passes Flower's mod on its way to a client, who has `parts`."""

    run = property(lambda self: SimpleNamespace(run_id=0))
    set_run = create_message = push_messages = pull_messages = lambda self, *_, **__: None

    def __init__(self, parts: dict[int, Task]) -> None:
        self.parts, self.contexts = parts, {node: blank(node) for node in parts}

    def get_node_ids(self) -> list[int]:
        return list(self.parts)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        sent = [copy.deepcopy(message) for message in messages]
        return [secaggplus_mod(message, self.contexts[message.metadata.dst_node_id], self.train) for message in sent]

    def train(self, message: Message, _context: Context) -> Message:
        part = self.parts[message.metadata.dst_node_id]
        weights = ndarrays_to_parameters([tensor.numpy() for tensor in part.trained().values()])
        result = FitRes(Status(Code.OK, ""), weights, len(part.images), {})
        return Message(fitres_to_recorddict(result, False), reply_to=message)


def blank(node: int) -> Context:
    return Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={})


def aggregated(task: Task, max_weight: float | None) -> dict[str, torch.Tensor]:
    """The mean that the server has of three clients' weights, each after one step on its part of the batch."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 0, 0
    parts = zip(task.images.tensor_split(len(CLIENTS)), task.labels.tensor_split(len(CLIENTS)), strict=True)
    room = Room({node: Task(task.name, task.weights, *part) for node, part in zip(CLIENTS, parts, strict=True)})
    most, clients = float(max(len(part.images) for part in room.parts.values())), SimpleClientManager()
    for node in CLIENTS:
        clients.register(GridClientProxy(node, room, 0))
    start = ndarrays_to_parameters([tensor.numpy() for tensor in task.weights.values()])
    strategy = legacy.FedAvg(min_fit_clients=len(CLIENTS), min_available_clients=len(CLIENTS))
    context = LegacyContext(blank(0), ServerConfig(1), strategy, clients)
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({"current_round": 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(start, True)
    SecAggPlusWorkflow(len(CLIENTS), 2, max_weight=max_weight or most)(room, context)
    mean = parameters_to_ndarrays(arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True))
    return dict(zip(task.weights, map(torch.as_tensor, mean), strict=True))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    capture(path, folder)
    for mechanism, max_weight in SECURE:
        keep(folder, Task.load(path), "flwr", mechanism, aggregated(Task.load(path), max_weight))
