"""What a client did to its gradient beside what it says, read off the update: factors, weight decay, Adam, a loss.

A `Reading` is an update with that undone, and words for it. It is a guess until an attack's own certificate holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spear.federated import adam, per_tensor
from spear.federated.parts import SIDES, Part, widest_part
from spear.federated.received import is_finite
from spear.federated.update import LOOKED_AT, LOSSES, Lazy, SharedUpdate, is_perturbed, under_names_of

FEWEST = 8  # rows and columns that a gradient needs for that
SINGULAR = 1e-7  # of the largest singular value: the least, under which weights do not tell eigenvalues
ROUNDING = 1e-12  # of the largest singular value: what is under that, or the spacing, of most is no decay but rounding
SPACE = 1e-9  # the same, above which a direction belongs to the column space
STEPS = ((2, 1), (1, 2), (3, 1), (1, 4), (2, 2), (5, 1), (1, 3))  # epochs and mini-batches that are tried, untold
TOGETHER = 0.01  # relative distance of eigenvalues that are one


@dataclass(frozen=True)
class Reading:
    """An update as it is taken, and what was undone for that, in words; a `doubt` forbids to certify what it gives.

    `error` is how far off the factors of whole tensors may be, relative to them, that were undone.
    """

    update: SharedUpdate
    words: tuple[str, ...] = ()
    doubt: str = ""
    error: float = 0.0


def read(model: nn.Module, update: SharedUpdate) -> Reading:
    """The update under the model's names, without factors of tensors and weight decay, of Adam's first step the
    gradient.

    Raises `ValueError` as `under_names_of` does.
    """
    named, words = under_names_of(model, update)
    words += (adam.SIGNS,) if _is_sign(named) else ()
    if update.local_steps > 1 or update.pruning is not None or is_perturbed(update) or not _fits(model, named):
        return Reading(named, words)
    if (scaled := per_tensor.undone(model, named)) is not None:
        return Reading(scaled[0], (*words, scaled[1]), error=scaled[2])
    reading = Reading(named, words)
    if (seen := _decay(model, named)) is None:
        reading = _without_adam(model, reading)
        seen = _decay(model, reading.update) if reading.doubt else None
    undone = without_decay(model, reading.update, seen)
    return reading if undone is None else replace(undone, words=reading.words + undone.words, doubt=reading.doubt)


def _is_sign(update: SharedUpdate) -> bool:
    """Whether all entries but zeros are of one size; a part of each tensor answers for the whole."""
    parts = [g.flatten()[:LOOKED_AT].abs() for g in update.gradients.values() if g.is_floating_point()]
    sizes = [part[part > 0] for part in parts]
    least, most = ([float(f(size)) for size in sizes if len(size)] for f in (torch.min, torch.max))
    return sum(map(len, sizes)) > FEWEST**2 and min(least) == max(most)


def other_losses(update: SharedUpdate) -> Iterator[Reading]:
    """The update with each loss that the client did not tell."""
    for loss in LOSSES:
        if loss != update.loss:
            yield Reading(replace(update, loss=loss), (f"the update fits the loss {loss}, told was {update.loss}",))


def other_steps(update: SharedUpdate) -> Iterator[Reading]:
    """A change of weights by several local steps where one was told, or by one where several were."""
    told = f"told {'was' if update.local_steps == 1 else 'were'} {update.local_steps}"
    if update.local_steps > 1:
        one = replace(update, local_steps=1, mini_batch=None, momentum=0.0)
        yield Reading(one, (f"the update is that of one step, {told}",))
        return
    if update.learning_rate is None or update.count is None or is_perturbed(update) or update.pruning is not None:
        return
    for epochs, parts in STEPS:
        size = -(-update.count // parts)
        steps = epochs * -(-update.count // size)
        if steps > 1:
            words = f"the update is that of {steps} steps on {size} samples each, {told}"
            yield Reading(replace(update, local_steps=steps, mini_batch=size), (words,))


def _without_adam(model: nn.Module, reading: Reading) -> Reading:
    """The gradient behind Adam's first step; any other update as it is."""
    found = adam.undone(model, reading.update)
    if found is None or found.update is reading.update:
        return reading if found is None else replace(reading, words=(*reading.words, found.words))
    doubt = "nothing is certified: the constants of the optimiser's step were estimated"
    return Reading(found.update, (*reading.words, found.words), doubt)


def without_decay(model: nn.Module, update: SharedUpdate, seen: float | None) -> Reading | None:
    """The gradient without the multiple of the weights, `seen` or told, that weight decay adds; None without any."""
    rate, told = update.learning_rate or 1.0, update.weight_decay
    decay = told * rate * update.loss_scale if seen is None else seen
    if not decay:
        return None
    parameters, received = dict(model.named_parameters()), update.gradients
    kept = _not_decayed(parameters, update, decay)

    def gradient(name: str) -> Tensor:
        g = received[name]
        return g if name in kept else g - (decay * parameters[name].detach()).to(g)

    shown = decay / rate / update.loss_scale
    words = f"a weight decay of {shown:.6g} was taken off"
    words += f", told was {told:g}" if told and abs(shown - told) > TOGETHER * told else ""
    words += f"; none was on {', '.join(sorted(kept))}" if kept else ""
    lazy = Lazy(tuple(received), gradient)
    lazy = replace(lazy, rounding=max(_left_by(lazy, received), getattr(received, "rounding", 0.0)))
    return Reading(replace(update, gradients=lazy, weight_decay=0.0), (words,))


def _left_by(less: Lazy, received: Mapping[str, Tensor]) -> float:
    """How much of what is left of each tensor the rounding of all of it may be."""
    pairs = [(received[name], less[name]) for name in less]
    norm = torch.linalg.vector_norm
    return max(torch.finfo(g.dtype).eps * float(norm(g.double()) / norm(x.double())) for g, x in pairs if x.any())


def _decay(model: nn.Module, update: SharedUpdate) -> float | None:
    """t for which G - t W has a rank below half, as the gradient of a small batch has; None where there is none.

    It is then the eigenvalue that most of W⁻¹ G's are, here of a part of both.
    """
    for side in SIDES:  # a small part shows a plain gradient of a small batch
        part = widest_part(model, update, side)
        if part is None or len(part) < FEWEST or _is_plain(part):
            return None
    return _shared_eigenvalue(part)


def _is_plain(part: Part) -> bool:
    """Whether the gradient's rank is below half of the part."""
    seen = torch.linalg.svdvals(part.received)
    return not seen.median() > max(ROUNDING, part.eps) * seen[0]


def _shared_eigenvalue(part: Part) -> float | None:
    """The eigenvalue that most of W⁻¹ G's are; None where there is none."""
    G, W = part.received, part.weights
    own = torch.linalg.svdvals(W)
    if not own[-1] > SINGULAR * own[0]:
        return None
    values = torch.linalg.eigvals(torch.linalg.solve(W, G))
    shared = values.real.median()
    near = (values - shared).abs() < TOGETHER * shared.abs()
    return float(shared) if 2 * int(near.sum()) > len(values) else None


def _not_decayed(parameters: dict[str, nn.Parameter], update: SharedUpdate, decay: float) -> set[str]:
    """The biases, where they are without decay: their gradients lie in their layers' column spaces as they are."""
    biases, raw, less = set(), 0.0, 0.0
    for name in update.gradients:
        weight = f"{name.removesuffix('bias')}weight"
        if not name.endswith("bias") or weight not in update.gradients or parameters[weight].ndim != 2:
            continue
        W, beta = (parameters[n].detach().double() for n in (weight, name))
        U, s, _ = torch.linalg.svd(update.gradients[weight].to(W) - decay * W, full_matrices=False)
        space, g = U[:, s > SPACE * s[0]], update.gradients[name].to(beta)
        biases.add(name)
        raw, less = raw + _outside(space, g), less + _outside(space, g - decay * beta)
    return biases if raw < less else set()


def _outside(space: Float[Tensor, "m r"], g: Float[Tensor, " m"]) -> float:
    """What is left of g beside an orthonormal basis."""
    return float(torch.linalg.vector_norm(g - space @ (space.mT @ g)))


def _fits(model: nn.Module, update: SharedUpdate) -> bool:
    """Whether weights and gradients are finite numbers, in the same shapes."""
    parameters = dict(model.named_parameters())
    return all(_pair_fits(parameters.get(name), g) for name, g in update.gradients.items())


def _pair_fits(parameter: nn.Parameter | None, g: Tensor) -> bool:
    if parameter is None or parameter.is_meta or parameter.shape != g.shape:
        return False
    return all(x.is_floating_point() and is_finite(x) for x in (parameter, g))
