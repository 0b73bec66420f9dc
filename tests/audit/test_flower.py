"""Flower: its strategy hook sees what clients send, in messages made by hand and in a deployment on loopback."""

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from spear import inversion, metrics
from spear.audit.flower import MonitoredStrategy
from spear.audit.monitor import Finding, Monitor
from spear.federated import SharedUpdate
from spear.figures import attempt

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'spear[flower]'")
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

APP = Path(__file__).parent / "flower_app"
SECONDS = 240  # that a deployment may take on a busy machine; 25 on a quiet one


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(APP)
    return importlib.import_module("app.client")


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Grid:
    """A grid of two nodes; messages can be made in this process, as in that of a server's app."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    nodes = create_autospec(Grid, instance=True)
    nodes.get_node_ids.return_value = [11, 22]
    return nodes


def replies(client, messages: list[Message]) -> Iterator[Message]:
    """What the two clients answer, each with its own partition."""
    for message in messages:
        context = Context(
            1, message.metadata.dst_node_id, {"partition-id": message.metadata.dst_node_id}, RecordDict(), {}
        )
        yield client.app(message, context)


def test_the_hook_sees_every_client(client, grid: Grid, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, seen = client.network(), list[Finding]()
    strategy = MonitoredStrategy(
        FedAvg(fraction_evaluate=0.0), Monitor(model, client.RATE, input_shape=(1, 8, 8), on_finding=seen.append)
    )
    arrays = ArrayRecord(model.state_dict())
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    answers = list(replies(client, messages))
    aggregate, numbers = strategy.aggregate_train(1, iter(answers))
    assert sorted(finding.client for finding in seen) == ["11", "22"]
    for finding in seen:
        assert finding.leaks
        assert metrics.evaluate(finding.result, *client.private(int(finding.client))).recall == 1
    warned = [record.getMessage() for record in caplog.records if record.name == "spear.monitor"]
    assert warned == [finding.words for finding in seen]
    plain, again = FedAvg(fraction_evaluate=0.0).aggregate_train(1, answers)
    assert numbers == again
    for name, weight in plain.to_torch_state_dict().items():
        assert torch.equal(aggregate.to_torch_state_dict()[name], weight)
    strategy.summary()
    assert strategy.configure_evaluate(1, arrays, ConfigRecord(), grid) == []
    assert strategy.aggregate_evaluate(1, []) is None


def test_a_failed_client_is_passed_on(client, grid: Grid) -> None:
    seen = list[Finding]()
    monitor = Monitor(client.network(), client.RATE, on_finding=seen.append)
    strategy = MonitoredStrategy(FedAvg(fraction_evaluate=0.0), monitor)
    arrays = ArrayRecord(client.network().state_dict())
    (message, _) = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    assert strategy.aggregate_train(1, [Message(Error(0, "out of memory"), reply_to=message)]) == (None, None)
    assert seen == []


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Flower server and two clients, each a process of its own; the environment in which `flwr` talks to them."""
    server, *clients = free_ports(3)
    (tmp_path / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "127.0.0.1:{server}"\ninsecure = true\n'
    )
    environment = os.environ | {"FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(APP.parents[2]), os.environ.get("PYTHONPATH")]))
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = [f"flower-superlink --insecure --port {server} --disable-runtime-dependency-installation"]
    for number, port in enumerate(clients):
        node = f"--port {port} --node-config partition-id={number}"
        commands.append(f"flower-supernode --insecure --superlink 127.0.0.1:{server} {node}")
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            output = stack.enter_context((tmp_path / f"{number}.log").open("w"))
            process = subprocess.Popen(command.split(), env=environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(attempt.end, process)
        yield environment


def test_a_deployment_on_loopback(client, deployment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "seen"
    folder.mkdir()
    command = ["flwr", "run", str(APP), "loopback", "--stream", "--run-config", f'folder="{folder}"']
    until = time.monotonic() + SECONDS
    while (run := subprocess.run(command, env=deployment, capture_output=True, text=True, timeout=SECONDS)).returncode:
        assert time.monotonic() < until, run.stderr  # the server does not listen yet
        time.sleep(0.5)
    torch.manual_seed(0)
    model, missing = client.network(), {0, 1}
    for path in folder.glob("1-*.safetensors"):
        result = inversion.attack(model, SharedUpdate.load(path))
        assert result.complete
        recall = {partition: metrics.evaluate(result, *client.private(partition)).recall for partition in missing}
        missing -= {partition for partition, share in recall.items() if share == 1}
    assert missing == set()
    log = run.stdout + run.stderr
    assert log.count("the update is invertible, 6 of 6 samples read back, 6 certified") == 2, log
