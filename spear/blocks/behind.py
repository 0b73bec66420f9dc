"""The samples behind a block's tokens, where the steps of `images` lead to them, held against every gradient."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spear.blocks import images
from spear.blocks.search import Tokens, together
from spear.blocks.view import BlockView
from spear.certificate import SAFETY
from spear.federated import losses
from spear.federated.received import check_gradients
from spear.federated.update import SharedUpdate
from spear.fronts.check import determined
from spear.fronts.least_squares import residual
from spear.fronts.problem import FrontProblem
from spear.fronts.search import sharpened
from spear.fronts.softened import Softness
from spear.models.sublayers import sublayer
from spear.models.tracing import traced_model
from spear.models.watching import watched
from spear.reconstruction import Reconstruction, Terms

EXACT = 1e-13  # relative residual of a sample's tokens that needs no further step
NEAR = 1e-3  # the same, up to which a sample was found
SMALL = 1e-6  # of the whole gradient's norm: what a parameter's is compared with, at least


def behind_tokens(
    model: nn.Module, update: SharedUpdate, view: BlockView, tokens: Tokens, found: Reconstruction, terms: Terms
) -> Reconstruction:
    """The samples behind all tokens of a block; the tokens, with what is in the way, where they do not lead there."""
    if update.input_shape is None or view.disclosed != len(tokens):
        return found
    read, why = _read(model, update, view, tokens)
    if read is None:
        return replace(found, reason=f"{found.reason}; the samples behind them: {why}")
    with sdpa_kernel(SDPBackend.MATH):  # the other ways of torch's attention have no second derivative
        return _judged(model, update, read, found, terms)


@dataclass(frozen=True)
class Read:
    """Samples (b, *shape) and the index (b, T) of the tokens that they make, in order; what computes these."""

    inputs: Float[Tensor, "b *shape"]
    problem: FrontProblem
    index: Int[Tensor, "b T"]


def _read(model: nn.Module, update: SharedUpdate, view: BlockView, tokens: Tokens) -> tuple[Read | None, str]:
    """The samples, or why there are none."""
    shape, x = update.input_shape, view.tokens(tokens.extended)
    part = sublayer(traced_model(model, shape), view.name)
    if part is None:
        return None, f"before {view.name} stands something else than a branch added to a stream, and normalised"
    received = check_gradients(model, update)
    if part.weight not in received:
        return None, f"the update has no gradient for {part.weight}"
    stream = images.stream_of(part, shape, x)
    if stream is None or len(tokens) % len(stream.start):
        return None, "the stream of tokens is not affine in a sample"
    total = received[part.weight].to(x)
    d, g = together(view, tokens)
    by_x = g @ view.lift[:, : x.shape[1]]
    streamed = images.before_branch(part, total.T if part.turned else total, x, by_x, d)
    if streamed is None:
        return None, f"the gradient of {part.weight} does not fit the tokens"
    place, alone = images.positions(stream, streamed.e)
    if not alone:
        return None, f"a token of {x.shape[1]} entries does not show its position beside what it shows of a sample"
    index = images.members(images.double(part.branch, x), part, streamed, place, stream)
    if index is None:
        return None, "which tokens are of one sample is not seen in what the branch gives"
    inputs, missing = images.samples(stream, streamed.e[index], shape)
    if missing:
        return None, f"{missing:,} of {inputs[0].numel():,} numbers of each are in no token"
    front = images.double(part.front, x)
    with torch.no_grad():
        made = front(inputs).unflatten(1, (-1, x.shape[1]))
    index = torch.cdist(made, x[None]).argmin(2)  # positions that show nothing of a sample differ by the branch alone
    if len(index.unique()) < len(x):
        return None, "they do not give the tokens back"
    return Read(inputs, FrontProblem(front, Softness(), False, shape, x[index].flatten(1), None, {}, 0.0), index), ""


def _judged(model: nn.Module, update: SharedUpdate, read: Read, found: Reconstruction, terms: Terms) -> Reconstruction:
    """Samples held against their tokens and every gradient of the model, with what certifies them."""
    problem, until = read.problem, terms.budget.until
    inputs = sharpened(problem, read.inputs, EXACT, until)
    rest = residual(problem, inputs, joint=False).samples
    if not bool((rest < NEAR).all()):
        return replace(found, reason=f"{found.reason}; the samples read from them do not give them back")
    known = found.error_bound[read.index].amax(1) / SAFETY  # once is enough
    bound = determined(problem, inputs, False, terms.generator(), until).bound(inputs, rest + known)
    labels, off = _reproduced(model, update, inputs)
    allowed = 1e-9 if found.limit <= 1e-6 else found.limit
    certified = found.certified[read.index].all(1) & (bound <= found.limit) & (off <= allowed)
    said = f"{found.reason}; each of the {len(inputs)} samples from its {read.index.shape[1]} tokens"
    said += f", every gradient of the model reproduced to {off:.0e}"
    if not bool(certified.all()):
        doubt = f"a sample is determined to {float(bound.max()):.0e}" if off <= allowed else "rounding allows less"
        said += f"; not certified: {doubt}"
    return replace(
        found,
        inputs=inputs,
        labels=labels,
        rank=len(inputs),
        residuals=rest,
        certified=certified,
        complete=bool(certified.all()),
        error_bound=bound,
        features_of="",
        reason=said,
        stats=terms.stats(found.stats.proposals, found.stats.rounds),
    )


def _reproduced(
    model: nn.Module, update: SharedUpdate, inputs: Float[Tensor, "b *shape"]
) -> tuple[Int[Tensor, " b"] | None, float]:
    """The label of each sample, by the gradient of the last linear layer, and the relative distance of the gradients of
    the whole batch to those received; infinite where they cannot be compared."""
    received, own = check_gradients(model, update), images.double(model, inputs)
    last = [(name, part) for name, part in own.named_modules() if isinstance(part, nn.Linear)][-1:]
    name = last[0][0] if last else ""
    if not last or f"{name}.weight" not in received:
        return None, math.inf
    with watched(last[0][1]) as seen:
        logits = own(inputs)
    features, made = seen[-1]
    if made is not logits or features.ndim != 2:
        return None, math.inf
    total, extended = received[f"{name}.weight"].to(inputs), features.detach()
    if f"{name}.bias" in received:
        total = torch.cat([total, received[f"{name}.bias"].to(inputs)[:, None]], 1)
        extended = torch.cat([extended, extended.new_ones(len(extended), 1)], 1)
    outputs = logits.shape[1]
    loss = "binary_cross_entropy" if update.loss == "cross_entropy" and outputs == 1 else update.loss
    unit = losses.slope(loss, outputs, update.reduction) / (len(inputs) if update.reduction == "mean" else 1)
    shown, activated = torch.linalg.lstsq(extended.T, total.T).solution / unit, losses.activate(loss, logits.detach())
    labels = (activated - shown).argmax(1) if outputs > 1 else ((activated - shown)[:, 0] > 0.5).long()
    errors = unit * (activated - losses.one_hot(labels, logits.detach()))
    return labels, _distance(own, logits, errors, received)


def _distance(own: nn.Module, logits: Tensor, errors: Tensor, received: Mapping[str, Tensor]) -> float:
    parameters = {name: p for name, p in own.named_parameters() if name in received and p.requires_grad}
    made = torch.autograd.grad(logits, list(parameters.values()), errors, materialize_grads=True)
    wanted = [received[name].to(errors) for name in parameters]
    least = SMALL * math.hypot(*(float(g.norm()) for g in wanted))
    return max(float((a - g).norm()) / max(float(g.norm()), least) for a, g in zip(made, wanted, strict=True))
