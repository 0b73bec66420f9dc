"""Limited-memory BFGS of many samples at once, each by itself."""

import time
from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MEMORY = 10  # steps that are remembered
SUFFICIENT = 1e-4  # of the decrease that the slope promises
SHORTER, SHORTEST = 0.3, 1e-3  # of a step that does not lower the cost; below that, straight down

Cost = Callable[[Float[Tensor, "k *shape"]], tuple[Float[Tensor, " k"], Float[Tensor, "k *shape"]]]


def dot(a: Float[Tensor, "k *shape"], b: Float[Tensor, "k *shape"]) -> Float[Tensor, " k"]:
    """Of each sample."""
    return (a * b).flatten(1).sum(1)


class Descent:
    """Coordinates c (k, *shape) on their way down a cost: a value of each sample that is zero at best, its gradient.

    Each step costs one evaluation. A sample whose cost a step does not lower stays, and tries a shorter one next time.
    """

    def __init__(self, cost: Cost, c: Float[Tensor, "k *shape"]) -> None:
        self.cost, self.c = cost, c
        self.value, self.gradient = cost(c)
        self.pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
        tiny = torch.finfo(c.dtype).tiny
        self.scale = 2 * self.value / dot(self.gradient, self.gradient).clamp_min(tiny)  # exact for |c|²
        self.direction = -self._wide(self.scale) * self.gradient
        self.share = torch.ones_like(self.value)

    def run(self, steps: int, until: float) -> Float[Tensor, "k *shape"]:
        """The coordinates after so many steps, or when `until` has passed on `time.monotonic`."""
        for _ in range(steps):
            if time.monotonic() >= until:
                break
            self._step()
        return self.c

    def _step(self) -> None:
        trial = self.c + self._wide(self.share) * self.direction
        value, gradient = self.cost(trial)
        better = value <= self.value + SUFFICIENT * self.share * dot(self.direction, self.gradient)
        self._remember(trial, gradient, better)
        self.c = torch.where(self._wide(better), trial, self.c)
        self.gradient = torch.where(self._wide(better), gradient, self.gradient)
        self.value = torch.where(better, value, self.value)
        self.direction = torch.where(self._wide(better), self._downwards(), self.direction)
        self.share = torch.where(better, 1.0, self.share * SHORTER)
        lost = self.share < SHORTEST
        self.direction = torch.where(self._wide(lost), -self._wide(self.scale) * self.gradient, self.direction)
        self.share = torch.where(lost, 1.0, self.share)

    def _remember(self, trial: Tensor, gradient: Tensor, better: Bool[Tensor, " k"]) -> None:
        """The step and the change of the gradient, of the samples that moved to where the cost curves upwards."""
        s = torch.where(self._wide(better), trial - self.c, 0)
        y = torch.where(self._wide(better), gradient - self.gradient, 0)
        curved, sizes = dot(s, y), dot(y, y)
        good = curved > 1e-10 * (dot(s, s) * sizes).sqrt()
        self.pairs.append((s, y, torch.where(good, 1 / torch.where(good, curved, 1), 0)))
        self.scale = torch.where(good, curved / torch.where(good, sizes, 1), self.scale)

    def _downwards(self) -> Float[Tensor, "k *shape"]:
        """The direction of quasi-Newton."""
        q, shares = self.gradient, []
        for s, y, inverse in reversed(self.pairs):
            shares.append(inverse * dot(s, q))
            q = q - self._wide(shares[-1]) * y
        q = self._wide(self.scale) * q
        for (s, y, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            q = q + self._wide(share - inverse * dot(y, q)) * s
        up = dot(q, self.gradient) <= 0
        return -torch.where(self._wide(up), self._wide(self.scale) * self.gradient, q)

    def _wide(self, s: Tensor) -> Tensor:
        return s.reshape(-1, *[1] * (self.c.ndim - 1))
