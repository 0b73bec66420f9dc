"""A cluster of two processes on this machine does what threads do, also when a worker is killed in mid-run."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from distributed import Client, LocalCluster
from nbformat.v4 import new_code_cell, new_notebook
from problems import make

import spear
from spear import executors, paths
from spear.cli import app
from spear.figures import schedule
from spear.figures.table import Run, load
from spear.published.algorithm import Sampling

SECONDS = 120  # for a worker to be there, also again

BODY = """\
import os, pathlib, time
import PIL.Image
folder = pathlib.Path(os.environ["SPEAR_FIGURES"])
_ = (folder / f"{stem}-plot.csv").write_text(f"attempt\\n{folder.parent.name}\\n")
while not pathlib.Path(go).exists():
    time.sleep(0.05)
PIL.Image.new("L", (2, 2)).save(folder / f"{stem}-plot.png")
"""


@pytest.fixture(scope="module")
def client():
    """A client of two workers, each a process of two threads, which is started again when it dies."""
    options = {"n_workers": 2, "threads_per_worker": 2, "host": "127.0.0.1", "dashboard_address": ":0"}
    with LocalCluster(**options) as local, Client(local) as client:
        client.wait_for_workers(2, timeout=SECONDS)
        yield client


@pytest.fixture
def address(client: Client) -> str:
    client.wait_for_workers(2, timeout=SECONDS)
    return client.scheduler_info()["address"]


def kill(client: Client, worker: str) -> None:
    os.kill(client.run(os.getpid)[worker], signal.SIGKILL)


def until(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(list(arguments))
    return int(caught.value.code or 0)


@pytest.mark.parametrize("lost", [False, True])
def test_a_search_is_the_same_bits_on_a_cluster_also_when_a_worker_is_killed(client, address, lost):
    problem = make(12, 60, 60)
    here = spear.attack(problem.model, problem.update, method="sampling", seed=1)
    assert here.complete
    assert here.stats.rounds > 2
    seen = []

    def progress(state):
        seen.append(state)
        if lost and len(seen) == 1:
            kill(client, next(iter(client.run(os.getpid))))

    with executors.connect(address) as executor:
        method = Sampling(executor=executor)
        there = spear.attack(problem.model, problem.update, method=method, seed=1, progress=progress)
    assert torch.equal(there.inputs, here.inputs)
    assert torch.equal(there.labels, here.labels)
    assert (there.stats.proposals, there.stats.rounds) == (here.stats.proposals, here.stats.rounds)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, ...]:
    """Two runs that end once the file `go` is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPEAR_FIGURES", raising=False)
    (tmp_path / "notebooks").mkdir()
    entries = []
    for stem in ("00_tiny", "01_tiny"):
        parameters = f"stem = {stem!r}\ngo = {str(tmp_path / 'go')!r}"
        cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(BODY)]
        metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), tmp_path / "notebooks" / f"{stem}.ipynb")
        profiles, writes = {"quick": {}, "paper": {}, "test": {}}, {f"{stem}-plot": "A picture."}
        entries.append({"name": stem, "notebook": f"{stem}.ipynb", "profiles": profiles, "writes": writes})
    (tmp_path / "notebooks" / "runs.yaml").write_text(yaml.safe_dump(entries))
    return load(tmp_path / "notebooks" / "runs.yaml", "quick")


def test_a_worker_killed_in_mid_run_loses_nothing_and_nothing_is_published_twice(client, address, table, monkeypatch):
    work, outcomes, published = paths.root() / "build" / "runs" / "quick", [], []
    publish, execute = schedule.publish, schedule.execute
    monkeypatch.setattr(schedule, "publish", lambda run, *rest: (published.append(run.name), publish(run, *rest)))

    def watch(outcome: schedule.RunStatus) -> None:
        outcomes.append((outcome.run, outcome.status))
        if [status for _, status in outcomes] == ["running", "running"]:
            until(lambda: len([*work.glob("*/1/figures/*.csv")]) == 2)
            kill(client, next(worker for worker, keys in client.processing().items() if keys))
            until(lambda: len([*work.glob("*/2/figures/*.csv")]) == 1)
            paths.write({paths.root() / "go": b""})

    def watched(*arguments, report, **options):
        execute(*arguments, report=lambda outcome: (report(outcome), watch(outcome)), **options)

    monkeypatch.setattr(schedule, "execute", watched)
    assert run("figures", "--scheduler", address) == 0
    names = [run.name for run in table]
    assert sorted(published) == names
    assert sorted(name for name, status in outcomes if status == "done") == names
    (again,) = [name for name, status in outcomes if status == "running again"]
    for name in names:
        numbers = (paths.figures() / f"{name}-plot.csv").read_text()
        assert numbers == f"attempt\n{2 if name == again else 1}\n"
    assert [schedule.is_current(run) for run in table] == [True, True]


def test_an_attack_from_the_command_line_takes_a_scheduler(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    problem = make(12, 60, 60)
    Path("factories.py").write_text("import problems\nmodel = lambda: problems.make(12, 60, 60).model\n")
    problem.update.save(Path("update.safetensors"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    command = [
        "attack",
        "--run-code",
        "factories:model",
        "update.safetensors",
        "--method",
        "sampling",
        "--scheduler",
        address,
    ]
    assert run(*command) == 1
    assert "certified  12" in capsys.readouterr().out


def test_an_address_that_nobody_answers_is_one_line_and_status_2(table, monkeypatch, capsys):
    monkeypatch.setattr(executors, "TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        listens = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        for address in ("nowhere", "tcp://127.0.0.1:1", "udp://127.0.0.1:8786", listens):
            assert run("figures", "--scheduler", address) == 2
            assert capsys.readouterr().err == f"spear: error: no scheduler answers at {address}\n"
    assert not (paths.root() / "build").exists()


def test_work_that_is_lost_is_an_error_that_names_the_scheduler(address):
    def lose() -> None:
        with executors.connect(address) as executor:
            future = executor.submit(time.sleep, 1)
            future.cancel()
            future.result()

    with pytest.raises(OSError, match=f"work was lost by the scheduler at {address}"):
        lose()


def test_without_the_package_the_extra_is_named(table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert run("figures", "--scheduler", "tcp://127.0.0.1:1") == 2
    assert "needs the package distributed: pip install 'spear[cluster]'" in capsys.readouterr().err
