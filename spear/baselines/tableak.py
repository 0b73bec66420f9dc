"""A TabLeak-like baseline: gradient matching for rows of a table, pooled over restarts."""

import time
from collections.abc import Sequence

import scipy  # its parts load when they are first used
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spear.baselines import closed_form
from spear.data.adult import Column
from spear.data.tables import discrete
from spear.federated.received import check_gradients
from spear.federated.update import SharedUpdate
from spear.reconstruction import Reconstruction, Stats

RATE = 0.06  # of Adam; continuous columns are in standard deviations


def tableak(
    model: nn.Module,
    update: SharedUpdate,
    columns: Sequence[Column],
    *,
    steps: int = 1500,
    restarts: int = 30,
    seed: int = 0,
) -> Reconstruction:
    """Gradient matching in the manner of TabLeak (Vero, Balunović, Dimitrov, Vechev, ICML 2023).

    Categories are relaxed to a softmax, the cosine distance of the gradients is lowered by Adam, from all `restarts` at
    once; then each start is matched, row by row, to the nearest one; their median is the answer. Numbers of steps and
    starts are the authors' as far as known. Labels are inferred (`spear.baselines.closed_form.infer_labels`).

    Raises `ValueError` where the batch size is not disclosed, and for gradients that do not fit the model.
    """
    began, labels = time.monotonic(), closed_form.infer_labels(model, update)
    distance = _Distance(model, update, labels, columns)
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    z = torch.randn(restarts, len(labels), columns[-1].stop, generator=generator, dtype=like.dtype).to(like.device)
    z.requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=RATE)
    for _ in range(steps):
        (z.grad,) = torch.autograd.grad(torch.vmap(distance)(z).sum(), z)
        optimizer.step()
    with torch.no_grad():
        reached = torch.vmap(distance)(z)
        rows = discrete(pool(distance.relax(z), reached), columns)
    nobody = torch.zeros(len(rows), dtype=torch.bool)
    unknown = torch.full((len(rows),), torch.inf, dtype=rows.dtype)
    reason = f"not certified: gradients matched to a cosine distance of {float(reached.min()):.1e}"
    stats = Stats(time.monotonic() - began, restarts, steps)
    return Reconstruction(rows, labels, len(rows), unknown, nobody, False, reason, stats)


class _Distance:
    """1 - cos(g(x), g*) of the gradients g of a relaxed batch x to the observed ones g*, as a function of z."""

    def __init__(self, model: nn.Module, update: SharedUpdate, labels: Int[Tensor, " b"], columns: Sequence[Column]):
        self.model, self.labels, self.reduction = model, labels, update.reduction
        self.observed = check_gradients(model, update)
        self.parameters = {name: p.detach() for name, p in model.named_parameters() if name in self.observed}
        fields = [column for column in columns if column.categories]
        like = next(iter(self.parameters.values()))
        self.members = like.new_zeros(columns[-1].stop, len(fields))  # which entry belongs to which category's field
        for place, column in enumerate(fields):
            self.members[column.start : column.stop, place] = 1

    def relax(self, z: Float[Tensor, "*restarts b n"]) -> Float[Tensor, "*restarts b n"]:
        """Rows whose categorical fields are softmaxes."""
        power = (z - z.amax(-1, keepdim=True).detach()).exp()
        total = power @ self.members @ self.members.mT
        categorical = self.members.any(1)
        return torch.where(categorical, power / torch.where(categorical, total, 1), z)

    def __call__(self, z: Float[Tensor, "b n"]) -> Float[Tensor, ""]:
        x = self.relax(z)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(self.model, parameters, (x,))
            return F.cross_entropy(logits, self.labels, reduction=self.reduction)

        g = torch.func.grad(loss)(self.parameters)
        product, size, seen = (
            sum((a[name] * b[name]).sum() for name in g) for a, b in ((g, self.observed), (g, g), (self.observed,) * 2)
        )
        return 1 - product / (size * seen).sqrt()


def pool(rows: Float[Tensor, "restarts b n"], distance: Float[Tensor, " restarts"]) -> Float[Tensor, "b n"]:
    """The median over starts, each with its rows in the order of those of the nearest start that they resemble."""
    best = rows[distance.nan_to_num(torch.inf).argmin()]
    aligned = []
    for start in rows:
        order = scipy.optimize.linear_sum_assignment(torch.cdist(best, start).nan_to_num(1e9).cpu())[1]
        aligned.append(start[torch.as_tensor(order, dtype=torch.long, device=rows.device)])
    return torch.stack(aligned).nanmedian(0).values
