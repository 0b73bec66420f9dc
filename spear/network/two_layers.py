"""Phase retrieval at the last two hidden layers at once, where the batch is too crowded for the last one alone.

With ReLU below, too, a sample's activations are y_i = ReLU(z'_i), primes for the layer below. With W = W_l and the
mask D' where y_i > 0, four vectors of one sample lie in known spaces:

    u_i = D_i ∘ h_i  and  h'_i = Wᵀ u_i,  both linear in t_i        g_i = D'_i ∘ h'_i  in span(U')
    z_i = [W | beta] [y_i; 1]  and  y_i >= 0,  both linear in s_i   D_i is where z_i > 0, D'_i where y_i > 0

Each mask is told twice, and Wᵀ ties the layers: batches of 0.6 of the width come back where u alone finds none.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spear.directions import TINY, quick, unit_rows
from spear.models.streaming import product_back
from spear.network.phase_retrieval import Iterate, Reflections, advance
from spear.network.side_by_side import SideBySide
from spear.network.spaces import Spaces, misfit, project

BELOW = 2.0  # weight of what g says of a mask beside what y says
RELAXATION = 0.7  # of a step


@dataclass(frozen=True)
class Pair(SideBySide):
    """A batch of starts: `vectors` [u; h'], `below` g, `samples` [z; y], h; and the last `target`s of u and of g.

    With few inputs (`FewInputs`), `vectors` is u, `below` z', and `target_below` y.
    """

    vectors: Float[Tensor, "k _vectors"]
    below: Float[Tensor, "k m1"]
    samples: Float[Tensor, "k both"]
    h: Float[Tensor, "k m"]
    target: Float[Tensor, "k m"]
    target_below: Float[Tensor, "k m1"]

    @property
    def above(self) -> Iterate:
        """What there is of it at the last hidden layer."""
        m = self.h.shape[1]
        return Iterate(self.vectors[:, :m], self.h, self.samples[:, :m], self.target)


@dataclass(frozen=True)
class TwoLayers:
    """The known spaces of both layers, each with an orthonormal basis: of u, of g, of [u; h'] and of [z; y].

    h' = `weight`ᵀ u and [z; y] = `lift` s, with h' and y scaled to the size of u and z.
    """

    basis: Float[Tensor, "m b"]
    below: Float[Tensor, "m1 b1"]
    vectors: Float[Tensor, "both b"]
    samples: Float[Tensor, "both r"]
    weight: Float[Tensor, "m m1"]
    lift: Float[Tensor, "both b"]

    @classmethod
    def of(
        cls, spaces: Spaces, weight: Float[Tensor, "m m1"], below: Float[Tensor, "m1 b1"], free: Float[Tensor, "b r"]
    ) -> "TwoLayers":
        """For samples whose s lie in the span of `free`; `weight` is W, `below` spans the gradient under it."""
        u, y = spaces.basis, spaces.rows[:, : weight.shape[1]].T
        back = product_back(u.T, weight).T
        scale = u.norm() / back.norm()
        lift = torch.cat([spaces.lift, y * ((spaces.lift @ free).norm() / (y @ free).norm())])
        vectors, samples = (torch.linalg.qr(x.float())[0] for x in (torch.cat([u, scale * back]), lift @ free))
        bases = (quick(x) for x in (u.float(), below.float(), vectors, samples))
        return cls(*bases, weight.float() * scale.float(), lift.float())

    def search(self, start: Iterate, s: Float[Tensor, "k b"], options: Reflections) -> Pair:
        """Where starts end whose h are given, and whose samples are s."""
        m = start.h.shape[1]
        samples = unit_rows(s.float() @ self.lift.T)
        h_below = start.u @ self.weight
        below = h_below * (samples[:, m:] > 0)
        pair = Pair(torch.cat([start.u, h_below], 1), below, samples, start.h, start.u, below)
        return advance(pair, self.forward, self.misfit, options)

    def misfit(self, pair: Pair) -> Float[Tensor, " k"]:
        """The larger one of both layers: squared sine between a target and the span that must hold it."""
        return torch.maximum(misfit(pair.target, self.basis), misfit(pair.target_below, self.below))

    def forward(self, pair: Pair, steps: int) -> Pair:
        """Relaxed reflections between these spaces and the masks. A sign chooses between two values, as in `relax`."""
        vectors, below, samples, h = pair.vectors, pair.below, pair.samples, pair.h
        m = h.shape[1]
        for _ in range(steps):
            near_vectors, near_below, near_samples = (
                project(x, basis)
                for x, basis in ((vectors, self.vectors), (below, self.below), (samples, self.samples))
            )
            u, h_below = torch.lerp(vectors, near_vectors, 2.0).tensor_split((m,), 1)
            z, y = torch.lerp(samples, near_samples, 2.0).tensor_split((m,), 1)
            g = torch.lerp(below, near_below, 2.0)
            size, middle = z.abs(), (g + h_below) / 2
            sign = ((2 * u - h) * h).addcmul_(z, size).sign_()
            says = (g * g - (g - h_below) ** 2 / 2).mul_(BELOW).addcmul_(y, y.abs())
            active = says.sign_().add_(1).div_(2)
            target = torch.addcmul(h, h, sign).div_(2)
            target_below = middle * active
            vectors = vectors + RELAXATION * (
                torch.cat([target, torch.lerp(h_below, middle, active)], 1) - near_vectors
            )
            below = below + RELAXATION * (target_below - near_below)
            kept = torch.cat([size.mul_(sign).add_(z).div_(2), y.clamp_min(0).mul_(active)], 1)
            samples = samples + RELAXATION * (kept - near_samples)
            samples = samples / samples.norm(dim=1, keepdim=True).clamp_min(TINY)
        return Pair(vectors, below, samples, h, target, target_below)


@dataclass(frozen=True)
class FewInputs:
    """The same where fewer inputs than samples are independent: g_i is then not in the span of the gradient below.

    But z'_i lies in a space as small, the image of that gradient's rows, of which `below` is a basis, and
    y_i = ReLU(z'_i). `basis` is that of u, `samples` that of [z; y] = `lift` s.
    """

    basis: Float[Tensor, "m b"]
    below: Float[Tensor, "m1 r1"]
    samples: Float[Tensor, "both r"]
    lift: Float[Tensor, "both b"]

    @classmethod
    def of(cls, spaces: Spaces, below: Float[Tensor, "m1 r1"], free: Float[Tensor, "b r"]) -> "FewInputs":
        """For samples whose s lie in the span of `free`; the columns of `below` span the possible z'."""
        y = spaces.rows[:, : len(below)].T
        lift = torch.cat([spaces.lift, y * ((spaces.lift @ free).norm() / (y @ free).norm())])
        below, samples = (torch.linalg.qr(x.float())[0] for x in (below, lift @ free))
        return cls(*(quick(x) for x in (spaces.basis.float(), below, samples)), lift.float())

    def search(self, start: Iterate, s: Float[Tensor, "k b"], options: Reflections) -> Pair:
        """Where starts end whose h are given, and whose samples are s."""
        samples = unit_rows(s.float() @ self.lift.T)
        below = samples[:, start.h.shape[1] :].clone()
        pair = Pair(start.u, below, samples, start.h, start.u, below)
        return advance(pair, self.forward, lambda now: misfit(now.target, self.basis), options)

    def forward(self, pair: Pair, steps: int) -> Pair:
        """Relaxed reflections between these spaces and the masks; `target_below` is y."""
        u, below, samples, h = pair.vectors, pair.below, pair.samples, pair.h
        m = h.shape[1]
        for _ in range(steps):
            near_u, near_below, near_samples = (
                project(x, basis) for x, basis in ((u, self.basis), (below, self.below), (samples, self.samples))
            )
            turned, z_below = torch.lerp(u, near_u, 2.0), torch.lerp(below, near_below, 2.0)
            z, y = torch.lerp(samples, near_samples, 2.0).tensor_split((m,), 1)
            size, middle = z.abs(), ((y + z_below) / 2).clamp_min_(0)
            sign = ((2 * turned - h) * h).addcmul_(z, size).sign_()
            off = y * y + z_below.clamp_min(0).square() - (y - middle).square() - (z_below - middle).square()
            active = off.sign_().add_(1).div_(2)
            target, y = torch.addcmul(h, h, sign).div_(2), middle * active
            u = u + RELAXATION * (target - near_u)
            below = below + RELAXATION * (y + (1 - active) * z_below.clamp_max(0) - near_below)
            kept = torch.cat([size.mul_(sign).add_(z).div_(2), y], 1)
            samples = samples + RELAXATION * (kept - near_samples)
            norm = samples.norm(dim=1, keepdim=True).clamp_min(TINY)
            samples, below = samples / norm, below / norm
        return Pair(u, below, samples, h, target, y)
