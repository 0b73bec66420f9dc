"""Images by their frequencies: coordinates in which natural images are likely to be short."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CHROMA = 0.3  # size of colour differences against that of brightness


@dataclass(frozen=True)
class Spectrum:
    """Coordinates c of inputs x = C S c: C orthonormal (cosines along the last one or two axes, brightness and colour
    differences of three channels), S diagonal, (1 + k)^-`decay` at k half-waves, a decay of each sample's own.

    Natural images have amplitudes that fall with about the first power of the frequency; their errors should fall
    faster while only the coarse ones are certain.
    """

    axes: tuple[Float[Tensor, "_side _side"], ...]
    colours: Float[Tensor, "channels channels"]
    sizes: Float[Tensor, "k *shape"]

    @classmethod
    def of(cls, shape: tuple[int, ...], decay: Float[Tensor, " k"]) -> "Spectrum":
        """Of inputs of that shape: images (channels, height, width), signals (channels, length), or anything else,
        which has no frequencies."""
        sides = shape[1:] if len(shape) in (2, 3) else ()
        axes = tuple(_cosines(side, decay) for side in sides)
        square = decay.new_zeros(())
        for side in sides:
            square = square[..., None] + torch.arange(side, dtype=decay.dtype, device=decay.device) ** 2
        base = (1 / (1 + square.sqrt())).expand(shape)
        colours = torch.eye(shape[0] if sides else 1, dtype=decay.dtype, device=decay.device)
        if sides and shape[0] == 3:
            colours = decay.new_tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]])
            colours = colours / torch.linalg.vector_norm(colours, dim=1, keepdim=True)
            base = base * decay.new_tensor([1, CHROMA, CHROMA]).reshape(3, *[1] * len(sides))
        return cls(axes, colours, base ** decay.reshape(-1, *[1] * len(shape)))

    def inputs(self, c: Float[Tensor, "k *shape"]) -> Float[Tensor, "k *shape"]:
        """C S c."""
        return self._turned(c * self.sizes, back=False)

    def adjoint(self, x: Float[Tensor, "k *shape"]) -> Float[Tensor, "k *shape"]:
        """S Cᵀ x."""
        return self._turned(x, back=True) * self.sizes

    def coordinates(self, x: Float[Tensor, "k *shape"]) -> Float[Tensor, "k *shape"]:
        """S⁻¹ Cᵀ x."""
        return self._turned(x, back=True) / self.sizes

    def _turned(self, x: Tensor, back: bool) -> Tensor:
        if not self.axes:
            return x
        x = torch.tensordot(x, self.colours if not back else self.colours.mT, ([1], [0])).movedim(-1, 1)
        for k, cosines in enumerate(self.axes):
            x = torch.tensordot(x, cosines if back else cosines.mT, ([2 + k], [0])).movedim(-1, 2 + k)
        return x


def _cosines(side: int, like: Tensor) -> Float[Tensor, "side side"]:
    """The orthonormal cosines of one axis, as columns."""
    n = torch.arange(side, dtype=like.dtype, device=like.device)
    made = torch.cos(torch.pi * (n[:, None] + 0.5) * n / side)
    return made / torch.linalg.vector_norm(made, dim=0)
