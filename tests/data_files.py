"""Sample packs, and files as publishers lay them out, for the tests of data."""

import struct

import numpy as np

from spear.data.packs import Pack

BUILT_IN = ("digits", "photos", "photos64", "photos224")
ON_DISK = ("mnist", "cifar10", "tinyimagenet", "imagenet", "adult")
SEEDS = (0, 1, 2)
ROW = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
    "United-States, <=50K"
)


def random_pack(seed=0, count=6, shape=(3, 5, 4), classes=("a", "b", "c")):
    generator = np.random.default_rng(seed)
    channels, height, width = shape
    images = generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return Pack(images, generator.integers(0, len(classes), count), tuple(classes))


def same(first, second):
    return (
        np.array_equal(first.images, second.images)
        and np.array_equal(first.labels, second.labels)
        and first.classes == second.classes
    )


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
