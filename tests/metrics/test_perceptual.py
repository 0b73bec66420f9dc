"""LPIPS: only with weights that are here, and then the library's distance of the images as given."""

import pytest
import torch
import torchvision

from spear.metrics import perceptual


def images(channels=3, side=32, seed=0):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder of weights as torchvision keeps it, with an untrained network for `squeeze` in place of the trained."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = perceptual.weights_file("squeeze")
    file.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)


def test_without_weights_there_is_no_number_and_no_download(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for network in perceptual.WEIGHTS:
        assert perceptual.lpips(images(), images(seed=1), network=network) is None
    assert not list(tmp_path.rglob("*"))


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (1, 8), (3, 80)])
def test_a_distance_of_each_pair(channels, side):
    first, second = images(channels, side), images(channels, side, seed=1)
    distance = perceptual.lpips(first, second, network="squeeze")
    assert distance.shape == (2,)
    assert bool((distance > 1e-4).all())
    assert float(perceptual.lpips(first, first, network="squeeze").abs().max()) == 0
    torch.testing.assert_close(perceptual.lpips(second, first, network="squeeze"), distance)
    torch.testing.assert_close(perceptual.lpips(first[1:], second[1:], network="squeeze"), distance[1:])


@pytest.mark.usefixtures("weights")
def test_values_are_clipped_to_what_a_picture_has():
    assert float(perceptual.lpips(images() * 0 + 1, images() * 0 + 3, network="squeeze").max()) == 0


def test_an_unknown_network_is_an_error():
    with pytest.raises(KeyError, match="resnet"):
        perceptual.lpips(images(), images(), network="resnet")
