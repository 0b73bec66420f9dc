"""What every attack shares: when it gives up, whom it tells, how it says no, and what it returns."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

SAME_INPUT = 1e-4  # relative distance under which two methods returned the same input


class Refusal(ValueError):
    """Why a method cannot begin, in words: the update is sound, a precondition of the method does not hold.

    Whoever can goes on with the next method, or returns nothing with this reason.
    """


def check_number(name: str, value: object, least: float | int, *, whole: bool = False) -> None:
    """Raises `ValueError`, by name, unless the value is `None` or a finite number (`whole`: an integer) >= `least`."""
    kind, words = (Integral, "a whole number") if whole else (Real, "a finite number")
    good = value is None or (isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value))
    if not good or (value is not None and value < least):
        raise ValueError(f"{name} is {words} of at least {least:g}, not {value!r}")


@dataclass(frozen=True)
class Progress:
    """Where a running attack stands: `found` of the `rank` directions or samples, `proposals` and `seconds` so far.

    `method` is the one that runs. `proposals` are kernels tested by sampling, starts of all other methods.
    """

    method: str
    found: int
    rank: int
    proposals: int
    seconds: float


@dataclass(frozen=True)
class Stats:
    """What an attack cost: `seconds`, `proposals` (kernels that sampling tested, starts of the others), `rounds`."""

    seconds: float
    proposals: int = 0
    rounds: int = 0


@dataclass(frozen=True)
class Budget:
    """When a search gives up: `seconds` after it `started`, or after `proposals`; `None` is no limit. Or earlier, when
    it is told to: `ended` is then when, and why.

    The clock is `time.monotonic`.
    """

    seconds: float | int | None = None
    proposals: int | None = None
    started: float = field(default_factory=time.monotonic)
    ended: list[tuple[float, str]] = field(default_factory=list, compare=False)

    @property
    def until(self) -> float:
        """What the clock shows when the time is up."""
        told = [clock for clock, _ in self.ended]
        return min([math.inf if self.seconds is None else self.started + self.seconds, *told])

    @property
    def latest(self) -> float:
        """What the clock shows when what was found must be tidied up: half of the tenth, or of the two seconds, that a
        time limit may be exceeded by."""
        return self.until + max(0.05 * (self.seconds or 0), 1.0)

    @property
    def elapsed(self) -> float:
        """Seconds since it started."""
        return time.monotonic() - self.started

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return self.seconds is not None or self.proposals is not None

    def spent(self, proposals: int) -> str:
        """Which limit is reached, in words; empty while none is."""
        if self.ended:
            return self.ended[0][1]
        if time.monotonic() >= self.until:
            return f"the time limit of {self.seconds:g} s was reached"
        if self.proposals is not None and proposals >= self.proposals:
            return f"the budget of {self.proposals:,} proposals was spent"
        return ""


@dataclass(frozen=True)
class Terms:
    """What a search is told: its budget, the seed of its random numbers, and whom it tells how far it came.

    Words that `progress` returns end the budget: what was found until then is returned.
    """

    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    progress: Callable[[Progress], str | None] | None = None

    def generator(self) -> Generator:
        """Random numbers on the CPU, the same on every device."""
        return Generator().manual_seed(self.seed)

    def report(self, method: str, found: int, rank: int, proposals: int) -> None:
        """Tell how far the search came, where somebody listens."""
        if self.progress is None:
            return
        words = self.progress(Progress(method, found, rank, proposals, self.budget.elapsed))
        if isinstance(words, str):
            self.budget.ended.append((time.monotonic(), words))

    def stats(self, proposals: int = 0, rounds: int = 0) -> Stats:
        """What it cost so far."""
        return Stats(self.budget.elapsed, proposals, rounds)


@dataclass(frozen=True)
class Reconstruction:
    """What the server recovered: k samples, in no particular order.

    `inputs` (k, *input shape) and `labels` (k,) or None; `residuals` (k,) is, per sample, the relative distance between
    its own gradient as recovered and as recomputed from input and label (infinite without labels); `certified` (k,)
    tells which samples are certain by the theorem of `spear.certificate`, in its terms and within its limits: by every
    layer where the rest of the model is known, by one layer alone where it is not. `rank` is the batch size that the
    gradient shows, `complete` whether the whole batch, as far as the client disclosed its size, was recovered and
    certified, and `reason` why the attack stopped, in words. Under noise nothing is certified or complete;
    `expected_error` (k,) is then each input's expected relative error |guess - truth| / |truth|, from what the server
    knows alone. `weights` (k,) are the weights in the loss, where clipping, or an average over unequal clients, made
    them differ from sample to sample. `method` is the method that made it: one of `spear.inversion.METHODS`, or
    "noise", "pruning" or "local training". `error_bound` (k,) bounds each input's relative error, to first order,
    rounding taken as independent, with a margin (`spear.certificate`); infinite where there is none. Of a certified
    input it is at most `limit`: 1e-6 where model and update are float64, else 1e-3. Where the update does not depend on
    the mean of the batch (batch normalisation behind the first layer), inputs that are not certified may be so up to
    one image that is added to all of them: `difference_bound` (k,) then bounds the error of each less their mean,
    relative to that; else it is `None`.
    `targets` (k, outputs) are the numbers that the client's squared error compares the outputs with, all samples
    weighing alike, where these are no labels: `labels` is then None.
    `features_of` is empty where the inputs are samples; else it names the linear layer of the model that they enter:
    features, which do not determine the samples, or from which these were not found.
    """

    inputs: Float[Tensor, "k *input_shape"]
    labels: Int[Tensor, " k"] | None
    rank: int
    residuals: Float[Tensor, " k"]
    certified: Bool[Tensor, " k"]
    complete: bool
    reason: str
    stats: Stats
    expected_error: Float[Tensor, " k"] | None = None
    weights: Float[Tensor, " k"] | None = None
    method: str = ""
    error_bound: Float[Tensor, " k"] | None = None
    limit: float = 1e-6
    difference_bound: Float[Tensor, " k"] | None = None
    features_of: str = ""
    targets: Float[Tensor, "k outputs"] | None = None

    def __post_init__(self) -> None:
        if self.error_bound is None:
            object.__setattr__(self, "error_bound", torch.full_like(self.residuals, torch.inf))

    @property
    def differences(self) -> Bool[Tensor, " k"]:
        """Which inputs, less the mean of the batch, are beyond doubt: those that are certified among them."""
        if self.difference_bound is None:
            return self.certified
        return self.certified | (self.difference_bound <= self.limit)

    def less_certain(self, error: Float[Tensor, " k"] | float) -> "Reconstruction":
        """The same where inputs may be off by a relative `error` beside the one that is bounded."""
        bound, apart = self.error_bound + error, self.difference_bound
        sure = self.certified & (bound <= self.limit)
        less = {"error_bound": bound, "difference_bound": None if apart is None else apart + error}
        return replace(self, certified=sure, complete=self.complete and bool(sure.all()), **less)


def larger(first: Reconstruction, second: Reconstruction) -> Reconstruction:
    """The result with more certified samples, then with more samples, joined by what only the other has; both reasons
    where neither has any."""
    if not len(first.inputs) and not len(second.inputs):
        return replace(first, reason=f"{first.reason}; {second.reason}")
    other, best = sorted((first, second), key=lambda r: (r.complete, int(r.certified.sum()), len(r.inputs)))
    if best.complete or best.labels is None or other.labels is None or len(other.inputs) <= len(best.inputs):
        return best
    return _joined(best, other)


def _joined(sure: Reconstruction, more: Reconstruction) -> Reconstruction:
    """All samples of `sure`, and those of `more` that are none of them: with unequal weights only a part is certain."""
    known = sure.inputs.flatten(1)
    apart = torch.cdist(more.inputs.flatten(1), known) > SAME_INPUT * torch.linalg.vector_norm(known, dim=1)
    new = apart.all(1)
    inputs, labels = torch.cat([sure.inputs, more.inputs[new]]), torch.cat([sure.labels, more.labels[new]])
    residuals = torch.cat([sure.residuals, more.residuals[new]])
    parts = {name: torch.cat([getattr(sure, name), getattr(more, name)[new]]) for name in ("certified", "error_bound")}
    words = {"reason": f"{sure.reason}; {more.reason}", "method": f"{sure.method}, {more.method}"}
    return replace(sure, inputs=inputs, labels=labels, residuals=residuals, difference_bound=None, **parts, **words)
