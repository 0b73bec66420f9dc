"""From the features that a head gave away to the inputs behind them, certified or not, or back as features."""

import copy
import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, fx, nn

from spear.federated.losses import activate, one_hot, slope
from spear.federated.received import check_gradients
from spear.federated.update import SharedUpdate
from spear.fronts.check import determined
from spear.fronts.least_squares import residual
from spear.fronts.problem import FrontProblem, without_last_relu
from spear.fronts.search import search, sharpened_together
from spear.fronts.softened import Softness
from spear.fronts.steps import folding
from spear.models.fronts import Cut
from spear.reconstruction import Reconstruction, Stats, Terms

NEARBY = 0.01  # of what is certified: the residual of a sample's features up to which its input was found
SAME = 1e-3  # relative distance at which the head's gradients are not those of the samples found
ZERO = 1e3  # times the features' accuracy, of the largest: what counts as zero
ENOUGH = 1e-13  # relative residual of features at which a search ends
SPARE = 16  # of the equations one in so many is left out of a certificate's rank: that many more are needed


def behind(cut: Cut, model: nn.Module, update: SharedUpdate, found: Reconstruction, terms: Terms) -> Reconstruction:
    """The samples behind the features `found`, where these and the gradients of the front determine them.

    Else the features, with what is missing in words, and `features_of` naming the layer that they enter.
    """
    if not len(found.inputs):
        return found
    as_features = replace(found, features_of=cut.layer, complete=False)
    said = f"{found.reason}; each is {found.inputs[0].numel()} features that enter {cut.layer}"
    problem, why = _open(cut, model, update, found)
    if problem is None:
        return replace(as_features, reason=f"{said}: {why}")
    if why := _missing(problem):
        return replace(as_features, reason=f"{said}: {why}")
    sought = search(problem, terms, ENOUGH)
    stats = Stats(terms.budget.elapsed, found.stats.proposals, found.stats.rounds + sought.rounds)
    good = sought.residuals <= NEARBY * found.limit
    if bool(good.all()):
        return replace(_judged(problem, sought.inputs, found, terms), stats=stats)
    spent = terms.budget.spent(0) or f"the search ended after {sought.rounds} passes"
    why = f"inputs were found for {int(good.sum())} of {len(good)}; {spent}"
    if not bool(good.any()):
        return replace(as_features, stats=stats, reason=f"{said}: {why}")
    return replace(_those(found, good, sought.inputs), stats=stats, reason=f"{said}: {why}")


def _those(found: Reconstruction, good: Bool[Tensor, " k"], inputs: Float[Tensor, "k *shape"]) -> Reconstruction:
    """The samples whose inputs were found, uncertified: the gradients of the front are those of all."""
    own = {name: getattr(found, name) for name in ("labels", "residuals", "weights")}
    own = {name: value if value is None else value[good] for name, value in own.items()}
    none = torch.zeros_like(good[good])
    unbounded = torch.full_like(own["residuals"], math.inf)
    return replace(found, inputs=inputs[good], certified=none, error_bound=unbounded, complete=False, **own)


def _judged(
    problem: FrontProblem, inputs: Float[Tensor, "k *shape"], found: Reconstruction, terms: Terms
) -> Reconstruction:
    """Inputs whose features are right, with what certifies them."""
    rest = residual(problem, inputs, joint=problem.slopes is not None)
    near = determined(problem, inputs, False, terms.generator(), terms.budget.until)
    bound = near.bound(inputs, rest.samples + found.error_bound)
    if problem.slopes is not None and not bool((bound <= found.limit).all()):
        inputs = sharpened_together(problem, inputs, ENOUGH, terms.budget.until)
        rest = residual(problem, inputs, joint=True)
        near = determined(problem, inputs, True, terms.generator(), terms.budget.until)
        parts = [rest.features, found.error_bound, *rest.gradients]
        bound = near.bound(inputs, torch.stack([part.norm() for part in parts]).norm().expand_as(bound))
    allowed = 1e-9 if found.limit <= 1e-6 else found.limit
    doubt = ""
    if problem.slopes is None:
        doubt = "the gradients of what computes the features could not be compared"
    elif rest.parameters > max(allowed, ENOUGH):
        doubt = f"the batch reproduces the front's gradients to {rest.parameters:.0e}, rounding allows {allowed:.0e}"
    elif not bool((bound <= found.limit).all()):
        doubt = "features and gradients do not determine every input where a share of the equations is left out"
    else:
        doubt = folding(problem.front, problem.shape, float(inputs.abs().max()))
    certified = found.certified & (bound <= found.limit) & (not doubt)
    complete = found.complete and bool(certified.all())
    reason = f"{found.reason}; each input from its features"
    if doubt or rest.gradients:
        reason += ", and every gradient of what computes these"
        reason += f": {doubt}" if doubt else f" is reproduced to {rest.parameters:.0e}"
    return replace(
        found,
        inputs=inputs,
        certified=certified,
        complete=complete,
        reason=reason,
        error_bound=bound,
        residuals=torch.maximum(found.residuals, rest.samples),
    )


def _missing(problem: FrontProblem) -> str:
    """How much of the inputs the equations cannot tell, in words; empty where they outnumber the unknowns."""
    own, unknowns = problem.positive.sum(1), problem.unknowns
    if bool((own * (1 - 1 / SPARE) >= unknowns).all()):
        return ""
    count, total = len(own), int(own.sum()) + problem.of_parameters
    said = f"{int(own.sum()):,} of these are positive, the front's gradients have {problem.of_parameters:,} entries"
    gap = count * unknowns - total
    if gap > 0:
        return f"{said}: for {count * unknowns:,} unknown entries, {gap:,} numbers are missing"
    least = int(own.min())
    return (
        f"{said}: an input has {unknowns:,} entries, its own features say {least:,}, and the gradients say the rest "
        "of all inputs together, which is not searched for"
    )


def _open(cut: Cut, model: nn.Module, update: SharedUpdate, found: Reconstruction) -> tuple[FrontProblem | None, str]:
    """What is known of the inputs; or why nothing is."""
    if cut.unknown:
        return None, cut.unknown
    if found.expected_error is not None or not bool((found.residuals < SAME).all()):
        return None, "they are not exact"
    features, received = found.inputs.double(), check_gradients(model, update)
    front, head = (_double(part, features) for part in (cut.front, cut.head))
    try:
        front, floored = without_last_relu(front, update.input_shape)
        with torch.no_grad():
            size = front(features.new_zeros(1, *update.input_shape)).numel()
    except (RuntimeError, TypeError, IndexError) as error:
        first = str(error).partition("\n")[0]
        return None, f"what computes them does not take real numbers: {first}"
    if size != features.shape[1]:
        return None, f"a sample makes {size // features.shape[1]} such rows, and which belong together is not known"
    gradients = {name: g.to(features) for name, g in cut.of_front(received).items()}
    slopes = _slopes(head, update, found, features)
    close = slopes is not None and _explains(head, features, update, found, cut.of_head(received))
    tolerance = ZERO * max(float(found.error_bound.max()), 1e-13) if found.limit <= 1e-6 else found.limit
    tolerance = min(tolerance, found.limit) if math.isfinite(tolerance) else found.limit
    given = (update.input_shape, features, slopes if close else None, gradients if close else {}, tolerance)
    return FrontProblem(front, Softness(), floored, *given), ""


def _double(part: fx.GraphModule, like: Tensor) -> fx.GraphModule:
    made = copy.deepcopy(part).to(like.device, torch.float64).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    return made


def _scaled_errors(logits: Float[Tensor, "k c"], update: SharedUpdate, found: Reconstruction) -> Float[Tensor, "k c"]:
    """dLoss/dlogits of each sample."""
    outputs = logits.shape[1]
    loss = "binary_cross_entropy" if update.loss == "cross_entropy" and outputs == 1 else update.loss
    one = slope(loss, outputs, update.reduction)
    count = update.count or len(found.inputs)
    weights = one / count if update.reduction == "mean" else one
    weights = weights if found.weights is None else one * found.weights[:, None].to(logits)
    return weights * (activate(loss, logits.detach()) - one_hot(found.labels.to(logits.device), logits))


def _slopes(
    head: fx.GraphModule, update: SharedUpdate, found: Reconstruction, features: Float[Tensor, "k n"]
) -> Float[Tensor, "k n"] | None:
    """dLoss/dfeatures of each sample; `None` without labels."""
    if found.labels is None:
        return None
    x = features.detach().requires_grad_()
    logits = head(x)
    return torch.autograd.grad(logits, x, _scaled_errors(logits, update, found))[0]


def _explains(
    head: fx.GraphModule,
    features: Float[Tensor, "k n"],
    update: SharedUpdate,
    found: Reconstruction,
    received: dict[str, Tensor],
) -> bool:
    """Whether features and labels, with their weights in the loss, make the head's gradients."""
    logits, parameters = head(features), dict(head.named_parameters())
    wanted = [parameters[name] for name in received]
    made = torch.autograd.grad(logits, wanted, _scaled_errors(logits, update, found), materialize_grads=True)
    pairs = zip(made, received.values(), strict=True)
    apart = [float((a - g.to(a)).norm() / g.to(a).norm().clamp_min(1e-300)) for a, g in pairs]
    return max(apart, default=math.inf) < SAME
