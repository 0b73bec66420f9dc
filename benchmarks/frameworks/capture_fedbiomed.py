"""Fed-BioMed: the training plan of a node with its loop and privacy, and the message that the researcher decodes.

A federation of it needs certificates, a node's data base and a researcher's server; a node's round is this plan and
this serialiser.
"""

import sys
from pathlib import Path

import torch
from exchange import RATE, Mechanism, Task, keep
from fedbiomed.common.dataloader import PytorchDataLoader
from fedbiomed.common.serializer import Serializer
from fedbiomed.common.training_args import TrainingArgs
from fedbiomed.common.training_plans import TorchTrainingPlan
from torch import Tensor, nn
from torch.utils.data import TensorDataset

PRIVATE = "sigma 0.4, clip 0.005 (no defaults)"
MECHANISMS = (
    (Mechanism("none", "SGD"), "SGD", None),
    (Mechanism("none (Adam)", "a plan's default optimizer, rate 0.1"), "Adam", None),
    (Mechanism("local DP", PRIVATE), "SGD", {"type": "local", "sigma": 0.4, "clip": 0.005}),
    (Mechanism("central DP", PRIVATE), "SGD", {"type": "central", "sigma": 0.4, "clip": 0.005}),
)


class Plan(TorchTrainingPlan):
    """A user's plan: network, optimizer, loss."""

    task: Task
    optimizer: str

    def init_model(self, model_args: dict) -> nn.Module:
        return self.task.network()

    def init_optimizer(self, optimizer_args: dict) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.model().parameters(), lr=optimizer_args["lr"])

    def training_step(self, data: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model().forward(data), target)

    def training_data(self) -> None:
        raise NotImplementedError("the loader is set")


def capture(path: Path, folder: Path) -> None:
    task = Task.load(path)
    for mechanism, optimizer, private in MECHANISMS:
        torch.manual_seed(0)
        Plan.task, Plan.optimizer, count = task, optimizer, len(task.images)
        arguments = {"num_updates": 1, "optimizer_args": {"lr": RATE}, "loader_args": {"batch_size": count}}
        arguments |= {"dp_args": private} if private else {}
        plan = Plan()
        plan.post_init({}, TrainingArgs(arguments, only_required=False), {})
        loader = PytorchDataLoader(TensorDataset(task.images, task.labels), batch_size=count)
        plan.set_data_loaders(train_data_loader=loader, test_data_loader=None)
        plan.training_routine()
        message = Serializer.dumps({"params": plan.after_training_params()})
        keep(folder, task, "fedbiomed", mechanism, Serializer.loads(message)["params"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    capture(Path(sys.argv[1]), Path(sys.argv[2]))
