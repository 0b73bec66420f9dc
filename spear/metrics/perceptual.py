"""LPIPS, a perceptual distance: computed where the weights of its network are on this machine, never downloaded."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor

WEIGHTS = {
    "alex": torchvision.models.AlexNet_Weights.DEFAULT,
    "vgg": torchvision.models.VGG16_Weights.DEFAULT,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.DEFAULT,
}
SMALLEST = 64  # pixels to a side: smaller images are enlarged, for the network's strides to leave something of them


def weights_file(network: str = "alex") -> Path:
    """Where torchvision keeps the ImageNet weights of an LPIPS network once they were downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS[network].url).name


def lpips(
    first: Float[Tensor, "b C H W"], second: Float[Tensor, "b C H W"], *, network: str = "alex"
) -> Float[Tensor, " b"] | None:
    """Learned perceptual distance (Zhang, Isola, Efros, Shechtman, Wang 2018) of each pair of images; 0 where equal.

    Images have 1 or 3 channels and values in [0, 1], to which they are clipped. `None` where `weights_file` does not
    exist: get it from the address in `WEIGHTS[network].url`. Raises `KeyError` for a network not in `WEIGHTS`.
    """
    if not weights_file(network).is_file():
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity  # slow to import

    pair = (_prepared(images) for images in (first, second))
    distance = learned_perceptual_image_patch_similarity(*pair, net_type=network, reduction="none", normalize=True)
    return distance.reshape(len(first)).double()


def _prepared(images: Float[Tensor, "b C H W"]) -> Float[Tensor, "b 3 h w"]:
    images = images.detach().cpu().float().clamp(0, 1).expand(-1, 3, -1, -1)
    scale = SMALLEST / min(images.shape[2:])
    return F.interpolate(images, scale_factor=scale, mode="bilinear") if scale > 1 else images
