"""pfl: its simulation of one round with one user; what the user's side hands to the aggregator is kept."""

import sys
from pathlib import Path

import torch
from exchange import RATE, Mechanism, Task, keep
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.common_types import Population
from pfl.context import UserContext
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.postprocessor.base import Postprocessor
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.laplace_mechanism import LaplaceMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism, NormClippingOnly
from pfl.stats import MappedVectorStatistics
from torch import Tensor, nn

CHANGE, BOUND = "after - before", 0.4
GAUSS = f"clipping bound {BOUND}, ε 2, δ 1e-6 (no defaults)"


def gaussian() -> GaussianMechanism:
    return GaussianMechanism.construct_single_iteration(clipping_bound=BOUND, epsilon=2.0, delta=1e-6)


MECHANISMS = (
    (Mechanism("none", "FederatedAveraging", CHANGE), lambda: []),
    (Mechanism("central GaussianMechanism", GAUSS, CHANGE), lambda: [CentrallyAppliedPrivacyMechanism(gaussian())]),
    (Mechanism("NormClippingOnly", "2-norm, bound 0.1 (no default)", CHANGE), lambda: [NormClippingOnly(2.0, 0.1)]),
    (Mechanism("local GaussianMechanism", GAUSS, CHANGE), lambda: [gaussian()]),
    (
        Mechanism("local LaplaceMechanism", f"clipping bound {BOUND} (1-norm), ε 2 (no defaults)", CHANGE),
        lambda: [LaplaceMechanism(BOUND, 2.0)],
    ),
)


class Net(nn.Module):
    """The network with the loss and metrics that pfl asks a module for."""

    def __init__(self, inside: nn.Sequential) -> None:
        super().__init__()
        self.inside = inside

    def loss(self, images: Tensor, labels: Tensor, eval: bool = False) -> Tensor:
        return nn.functional.cross_entropy(self.inside(images), labels)

    def metrics(self, images: Tensor, labels: Tensor, eval: bool = False) -> dict:
        return {}


class Keep(Postprocessor):
    """The last of the user's postprocessors: writes down what it is given."""

    def __init__(self, folder: Path, task: Task, mechanism: Mechanism) -> None:
        self.place = folder, task, "pfl", mechanism

    def postprocess_one_user(
        self, *, stats: MappedVectorStatistics, user_context: UserContext
    ) -> tuple[MappedVectorStatistics, Metrics]:
        keep(*self.place, {name: value.detach() for name, value in stats.items()})
        return stats, Metrics()


def capture(path: Path, folder: Path) -> None:
    task = Task.load(path)
    for mechanism, make in MECHANISMS:
        torch.manual_seed(0)
        net = Net(task.network())
        model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
        data = FederatedDataset(
            lambda user: Dataset((task.images, task.labels), user_id=user), get_user_sampler("random", ["one"])
        )
        backend = SimulatedBackend(data, data, [*make(), Keep(folder, task, mechanism)])
        rounds = NNAlgorithmParams(
            central_num_iterations=1, evaluation_frequency=10, train_cohort_size=1, val_cohort_size=0
        )
        local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=None)
        algorithm = FederatedAveraging()
        contexts, *_ = algorithm.get_next_central_contexts(model, 0, rounds, local, local)
        (context,) = [context for context in contexts if context.population == Population.TRAIN]
        backend.gather_results(model=model, training_algorithm=algorithm, central_context=context)


if __name__ == "__main__":
    torch.set_num_threads(1)
    capture(Path(sys.argv[1]), Path(sys.argv[2]))
