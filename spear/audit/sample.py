"""Batches to simulate a client with: a data set by name, a folder of pictures, or normal noise of the model's shape."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor, fx, nn

from spear.data import catalog, packs
from spear.data.known import BUILT_IN
from spear.federated.losses import logits_of
from spear.models import expansion, tracing
from spear.models.graphs import evaluating


@dataclass(frozen=True, eq=False)
class Sample:
    """Samples (N, *input shape) with their labels (N,), in words what they are, and the shape of one as a picture."""

    inputs: Float[Tensor, "N *input_shape"]
    labels: Int64[Tensor, " N"]
    words: str
    picture: tuple[int, ...]

    def take(self, count: int) -> tuple[Float[Tensor, "count *input_shape"], Int64[Tensor, " count"]]:
        """The first `count` of them. Raises `ValueError` for fewer than 1 or more than there are."""
        if not 1 <= count <= len(self.labels):
            raise ValueError(f"{self.words} has {len(self.labels)} samples: a batch cannot have {count}")
        return self.inputs[:count], self.labels[:count]


def input_shape(model: nn.Module, hint: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of one sample that the model takes: `hint`, or else found by trying.

    Tried are the shapes of the built-in images and the vectors that a linear layer takes which reads the data. Raises
    `ValueError` where the model takes none of them.
    """
    vectors = [layer.path.shape for layer in tracing.linear_layers(model, hint) if layer.from_data]
    shapes = [hint] if hint is not None else [*(catalog.shape(name) for name in BUILT_IN), *vectors]
    why = ""
    for shape in shapes:
        found, why = _tried(model, shape)
        if found:
            return shape
    if (given := tracing.count_inputs(model, hint)) != 1:
        raise ValueError(f"the model takes {given} inputs: no client of it is simulated; give an update")
    tried = ", ".join(map(str, shapes))
    hinted = f" ({why})" if hint is not None else ": say which shape one sample has"
    raise ValueError(f"the model gives no logits for samples of shape {tried}{hinted}")


def outputs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """How many logits the model gives for one sample of that shape; 0 where it fails or gives something else.

    Raises `ValueError` for a model from a file that expands the sample beyond measure.
    """
    return _tried(model, shape)[0]


def _tried(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, str]:
    """The same, and why there are none."""
    if isinstance(model, fx.GraphModule) and not expansion.computes(model, (2, *shape)):
        return 0, "it computes nothing from two of them"
    like = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model):
            logits = logits_of(model(torch.zeros(2, *shape, dtype=like.dtype, device=like.device)))
    except Exception as error:  # the model's own code may raise anything
        first = str(error).strip().partition("\n")[0]
        return 0, f"{type(error).__name__}: {first[:200]}"
    if logits.ndim != 2 or len(logits) != 2:
        return 0, f"of two samples it makes a tensor of shape {tuple(logits.shape)}"
    return logits.shape[1], ""


def choose(source: str | None, shape: tuple[int, ...], classes: int, *, most: int, seed: int = 0) -> Sample:
    """At most `most` samples in the order that `seed` gives, reshaped to `shape`, labels taken modulo `classes`.

    `source` is the name of a data set, a folder with one sub-folder of pictures for each class, or None for the
    built-in images with as many entries as `shape`, and standard normal inputs where there are none.

    Raises `ValueError` for samples of another size, and as `spear.data.load` and `spear.data.packs.from_folder` do.
    """
    if source is None:
        source = next((name for name in BUILT_IN if math.prod(catalog.shape(name)) == math.prod(shape)), None)
    if source is None:
        generator = Generator().manual_seed(seed)
        inputs = torch.randn(most, *shape, generator=generator, dtype=torch.float64)
        return Sample(inputs, torch.randint(classes, (most,), generator=generator), "standard normal inputs", shape)
    if Path(source).is_dir():
        inputs, labels = _folder(Path(source), shape, most, seed)
    else:
        inputs, labels = catalog.load(source, count=min(most, catalog.count(source)), seed=seed)
    own = tuple(inputs.shape[1:])
    if math.prod(own) != math.prod(shape):
        raise ValueError(f"samples of {source} have shape {own}; the model takes {shape}")
    return Sample(inputs.reshape(-1, *shape), labels % classes, source, own)


def _folder(folder: Path, shape: tuple[int, ...], most: int, seed: int) -> tuple[Tensor, Tensor]:
    pack = packs.from_folder(folder, shape if len(shape) == 3 and shape[0] in (1, 3) else None)
    index = torch.randperm(len(pack.labels), generator=Generator().manual_seed(seed))[:most]
    return 2 * pack.take(index) - 1, torch.from_numpy(pack.labels)[index]  # pixels from -1 to 1
