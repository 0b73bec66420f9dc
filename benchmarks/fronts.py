"""Images behind convolutional fronts, from one gradient: PSNR, exact and certified images, seconds, what is missing.

    python benchmarks/fronts.py [--cases NAME ...] [--seeds S ...] [--limit SECONDS] [--csv FILE]

Every model has a head Linear(features, 400) - ReLU - Linear(400, 10) in torch's default initialisation. Seconds are
those of the processor. Features are compared with those of the batch, images with the batch. Data sets that are not
there are skipped; `--csv` writes one row a case and seed, as benchmarks/fronts.csv.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import seeded
import torch
from torch import Tensor, nn

from spear import data, federated, metrics
from spear.inversion import attack
from spear.reconstruction import Reconstruction

HEAD = 400


@dataclass(frozen=True)
class Case:
    """A front, a data set, a batch size."""

    front: Callable[[], nn.Module]
    dataset: str
    batch: int


@dataclass(frozen=True)
class Row:
    """What one run measured; PSNR in dB (0 where features were returned), seconds of the processor."""

    case: str
    seed: int
    batch: int
    returned: str
    images_exact: int
    images_over_60_db: int
    psnr_min: float
    psnr_median: float
    features_error: float
    certified: int
    labels_right: float
    cpu_seconds: float
    reason: str


def block(a: int, b: int) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]


def vgg() -> nn.Module:
    return nn.Sequential(*block(3, 64), *block(64, 128), nn.Flatten())


def lenet(first: int, second: int) -> nn.Module:
    below = [nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*below, nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


def strided() -> nn.Module:
    second = nn.Conv2d(32, 64, 3, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), second, nn.ReLU(), nn.Flatten())


def averaged() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())


CASES = {
    "vgg-two-blocks-cifar10-8": Case(vgg, "cifar10", 8),
    "lenet-6-16-mnist-8": Case(lambda: lenet(6, 16), "mnist", 8),
    "lenet-32-64-mnist-8": Case(lambda: lenet(32, 64), "mnist", 8),
    "strided-cifar10-8": Case(strided, "cifar10", 8),
    "averaged-cifar10-8": Case(averaged, "cifar10", 8),
}


def model_of(case: Case, x: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        front = case.front()
        n = front.eval()(x[:1].float()).shape[1]
        return nn.Sequential(front, nn.Linear(n, HEAD), nn.ReLU(), nn.Linear(HEAD, 10)).double().eval()


def measure(name: str, case: Case, seed: int, limit: float) -> Row:
    """One attack on the gradient of a batch of real images."""
    x, y = data.load(case.dataset, count=case.batch, seed=seed)
    model = model_of(case, x, seed)
    update = federated.gradient(model, x, y)
    begin = time.process_time()
    found = attack(model, update, time_limit=limit, seed=seed)
    seconds = time.process_time() - begin
    return _row(name, case, seed, seconds, model[0], found, (x, y))


def _row(
    name: str,
    case: Case,
    seed: int,
    seconds: float,
    front: nn.Module,
    found: Reconstruction,
    batch: tuple[Tensor, Tensor],
) -> Row:
    x, y = batch
    with torch.no_grad():
        truth, own = front(x), found.inputs if found.features_of else front(found.inputs)
    features = metrics.evaluate(Reconstruction(**{**vars(found), "inputs": own}), truth, y)
    images = None if found.features_of else metrics.evaluate(found, x, y)
    nothing = torch.zeros(case.batch)
    psnr = nothing if images is None else images.psnr
    return Row(
        case=name,
        seed=seed,
        batch=case.batch,
        returned=f"features of {found.features_of}" if found.features_of else "images",
        images_exact=0 if images is None else int(images.recovered.sum()),
        images_over_60_db=int((psnr > 60).sum()),
        psnr_min=float(psnr.min()),
        psnr_median=float(psnr.median()),
        features_error=float(features.relative_error.max()),
        certified=int(found.certified.sum()),
        labels_right=features.label_accuracy,
        cpu_seconds=seconds,
        reason=found.reason,
    )


if __name__ == "__main__":
    seeded.run(measure, CASES, limit=1800.0, about=__doc__)
