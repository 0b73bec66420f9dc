"""What simulated clients hold, and the shape that a model takes."""

from pathlib import Path

import pytest
from audited import SHAPE
from PIL import Image
from torch import nn

from spear.audit.sample import choose, input_shape, outputs


def test_what_simulated_clients_hold(tmp_path: Path) -> None:
    noise = choose(None, (7,), 3, most=6, seed=1)
    assert (noise.words, noise.inputs.shape, int(noise.labels.max()) < 3) == ("standard normal inputs", (6, 7), True)
    flat = choose(None, (64,), 3, most=6)
    assert (flat.words, flat.inputs.shape, flat.picture) == ("digits", (6, 64), SHAPE)
    for number in range(4):
        place = tmp_path / f"class{number % 2}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (40 * number, 0, 255)).save(place)
    own = choose(str(tmp_path), (3, 8, 8), 5, most=3)
    assert (own.inputs.shape, own.words) == ((3, 3, 8, 8), str(tmp_path))
    assert float(own.inputs.min()) == -1
    assert float(own.inputs.max()) == 1


@pytest.mark.parametrize(("front", "shape"), [(nn.Flatten(), SHAPE), (nn.Identity(), (64,))])
def test_the_input_shape_is_found_by_trying(front: nn.Module, shape: tuple) -> None:
    model = nn.Sequential(front, nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 4))
    assert input_shape(model) == shape
    assert outputs(model, shape) == 4
    assert outputs(model, (65,)) == 0
    with pytest.raises(ValueError, match="say which shape one sample has"):
        input_shape(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(30, 9), nn.ReLU()))
