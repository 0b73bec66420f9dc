"""How the Adult census table is laid out: one-hot categories beside continuous columns, in any part of the table.

It is read by `spear.data.census`; here are names and numbers alone, for whoever asks before torch is loaded.
"""

from dataclasses import dataclass
from itertools import accumulate

CLASSES = ("<=50K", ">50K")
# Names, categories ("?" stands for missing) and order as in the archive's own description, adult.names.
_FIELDS: tuple[tuple[str, str], ...] = (
    ("age", ""),
    (
        "workclass",
        "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked ?",
    ),
    ("fnlwgt", ""),
    (
        "education",
        "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th Masters 1st-4th 10th "
        "Doctorate 5th-6th Preschool",
    ),
    ("education-num", ""),
    (
        "marital-status",
        "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse",
    ),
    (
        "occupation",
        "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners "
        "Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv "
        "Armed-Forces ?",
    ),
    ("relationship", "Wife Own-child Husband Not-in-family Other-relative Unmarried"),
    ("race", "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black"),
    ("sex", "Female Male"),
    ("capital-gain", ""),
    ("capital-loss", ""),
    ("hours-per-week", ""),
    (
        "native-country",
        "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India Japan Greece South "
        "China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France "
        "Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand "
        "Yugoslavia El-Salvador Trinadad&Tobago Peru Hong Holand-Netherlands ?",
    ),
)
# Mean and standard deviation of the continuous columns over the 32,561 rows of adult.data.
_MOMENTS = {
    "age": (38.5816, 13.6404),
    "fnlwgt": (189778.0, 105550.0),
    "education-num": (10.0807, 2.5727),
    "capital-gain": (1077.65, 7385.29),
    "capital-loss": (87.3038, 402.960),
    "hours-per-week": (40.4375, 12.3474),
}


@dataclass(frozen=True)
class Column:
    """A column of the table and its place in an encoded row: entries `start` to `stop`, one-hot, or a single number."""

    name: str
    start: int
    categories: tuple[str, ...]  # none: continuous

    @property
    def stop(self) -> int:
        """One past the column's last entry."""
        return self.start + max(1, len(self.categories))


def _layout() -> tuple[Column, ...]:
    categories = {name: tuple(words.split()) for name, words in _FIELDS}
    starts = accumulate((max(1, len(words)) for words in categories.values()), initial=0)
    return tuple(Column(name, start, words) for start, (name, words) in zip(starts, categories.items(), strict=False))


COLUMNS = _layout()
WIDTH = COLUMNS[-1].stop


def moments() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each entry of an encoded row: 0 and 1 for one-hot entries, which stay unscaled."""
    one_hot = (0.0, 1.0)
    entries = [one_hot if c.categories else _MOMENTS[c.name] for c in COLUMNS for _ in range(c.start, c.stop)]
    mean, std = zip(*entries, strict=True)
    return mean, std
