"""The table of papermill runs, `notebooks/runs.yaml`: read, and checked against the notebooks it names.

The file is a list of runs::

    - name: 04_sampling                        # unique; one notebook may have several runs
      notebook: 04_sampling.ipynb
      profiles:                                # values that replace those of the notebook's parameters cell
        quick: {}
        paper: {seeds: 100}
        test: {seeds: 2}
      datasets: [mnist, cifar10]               # may be left out: the profile paper runs once for each of them
      writes:                                  # figures, a PNG and a CSV of this stem each, and their captions
        04_sampling-counts: Submatrices drawn until every column was met, measured and predicted.

Papermill itself only warns of a parameter that the notebook does not have, and YAML drops a repeated key without a
word; here each is an error that names it.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from spear import paths
from spear.figures.notebook import code_cells

PROFILES = ("quick", "paper", "test")
KEYS = ("name", "notebook", "profiles", "writes")
OPTIONAL = ("datasets",)


@dataclass(frozen=True)
class Run:
    """One execution of a notebook: the values its parameters cell is overridden with, and the figures it writes.

    `captions` maps the stem of each figure to its caption. `dataset` is the data set that the notebook is run on where
    `load` was asked for one, or the table names several.
    """

    name: str
    notebook: Path
    profile: str
    parameters: Mapping[str, object]
    captions: Mapping[str, str]
    dataset: str | None = None

    @property
    def variant(self) -> str:
        """Folder of its figures, under that of all: of its own for another profile than quick, or another data set."""
        return f"{self.profile}/{self.dataset}" if self.dataset else "" if self.profile == "quick" else self.profile

    @property
    def folder(self) -> Path:
        """Where its figures are."""
        return paths.figures() / self.variant

    @property
    def work(self) -> Path:
        """Where it is carried out."""
        return paths.root() / "build" / "runs" / (self.variant or self.profile) / self.name

    @property
    def record(self) -> Path:
        """What it was made of, and how long it took; beside the figures, and committed with them, at full size."""
        return self.folder / f"{self.name}.json" if self.profile == "paper" else self.work.with_suffix(".json")

    @property
    def label(self) -> str:
        """What it is called where runs of several data sets stand side by side."""
        return f"{self.name} on {self.dataset}" if self.dataset else self.name

    @property
    def files(self) -> tuple[str, ...]:
        """File names of the figures and of their numbers."""
        return tuple(f"{stem}{suffix}" for stem in self.captions for suffix in (".csv", ".png"))


def load(table: Path, profile: str, dataset: str | None = None) -> tuple[Run, ...]:
    """The runs of one profile, in the order of the table; every profile is checked, not only this one.

    `table` is the YAML file; notebooks are looked up in its folder. With a `dataset`, those runs whose notebook has a
    parameter of this name, which it overrides; without, the profile paper has a run for each of the `datasets` that an
    entry names. Raises `FileNotFoundError` without the file and
    `ValueError`, naming the run and the culprit, for: a profile, notebook, parameter or key that does not exist, a
    missing or repeated key, a repeated name, a value of another type than the notebook's own, and a figure that is
    declared twice, not named after its notebook or without a caption, and for `datasets` that are none.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: use one of {', '.join(PROFILES)}")
    entries = _read(table)
    for entry in entries:
        _check_entry(entry, table)
    _refuse_repeats("run name", (entry["name"] for entry in entries), table)
    _refuse_repeats("figure", (stem for entry in entries for stem in entry["writes"]), table)
    found = tuple(run for entry in entries for run in _runs(entry, table, profile, dataset))
    if not found:
        raise ValueError(f"{table}: no notebook has a parameter 'dataset'")
    return found


def _runs(entry: Mapping, table: Path, profile: str, dataset: str | None) -> Iterator[Run]:
    """The runs of one entry: one, or one for each of its data sets."""
    notebook, values = table.parent / entry["notebook"], entry["profiles"][profile]
    own = entry.get("datasets") if profile == "paper" else None
    for name in own or [None] if dataset is None else [dataset]:
        if name is None:
            yield Run(entry["name"], notebook, profile, values, entry["writes"])
        elif "dataset" in parameters(notebook):
            yield Run(entry["name"], notebook, profile, values | {"dataset": name}, entry["writes"], name)


def parameters(notebook: Path) -> dict[str, object]:
    """Names and values in the notebook's one cell tagged `parameters`, which holds plain assignments of literals."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{notebook.name}: {len(cells)} cells are tagged 'parameters', not one")
    try:
        statements = ast.parse(cells[0].source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise ValueError(f"{notebook.name}: the parameters cell is no Python: {error}") from error
    return dict(_assignment(statement, notebook) for statement in statements)


def _assignment(statement: ast.stmt, notebook: Path) -> tuple[str, object]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            try:
                return name, ast.literal_eval(value)
            except (ValueError, TypeError):
                pass
    line = ast.unparse(statement)
    raise ValueError(f"{notebook.name}: {line!r} in the parameters cell is not a plain assignment of a literal")


class _Loader(yaml.SafeLoader):
    """YAML where a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


def _read(table: Path) -> list:
    if not table.is_file():
        raise FileNotFoundError(f"{table}: no such file")
    try:
        entries = yaml.load(table.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{table}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{table}: not a list of runs")
    return entries


def _check_entry(entry: object, table: Path) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{table}: {entry!r} is not a run with the keys {', '.join(KEYS)}")
    where = f"{table}: run {entry.get('name', '?')!r}"
    _same_keys({key: value for key, value in entry.items() if key not in OPTIONAL}, KEYS, "key", where)
    _check_name(entry["name"], f"{where}: a name")
    if not isinstance(entry["notebook"], str):
        raise ValueError(f"{where}: notebook {entry['notebook']!r} is no file name")
    notebook = table.parent / entry["notebook"]
    if not notebook.is_file():
        raise ValueError(f"{where}: unknown notebook {entry['notebook']!r}")
    _check_profiles(entry["profiles"], notebook, where)
    _check_figures(entry["writes"], notebook, where)
    _check_data_sets(entry.get("datasets", []), notebook, where)


def _check_data_sets(names: object, notebook: Path, where: str) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: datasets is not a list of names")
    if names and "dataset" not in parameters(notebook):
        raise ValueError(f"{where}: datasets are given, but {notebook.name} has no parameter 'dataset'")
    _refuse_repeats("data set", names, where)


def _check_profiles(profiles: object, notebook: Path, where: str) -> None:
    if not isinstance(profiles, dict):
        raise ValueError(f"{where}: profiles is not a mapping of {', '.join(PROFILES)}")
    _same_keys(profiles, PROFILES, "profile", where)
    own = parameters(notebook)
    for profile, values in profiles.items():
        if not isinstance(values, dict):
            raise ValueError(f"{where}: profile {profile!r} is not a mapping of parameters; write {{}} for none")
        for name, value in values.items():
            if name not in own:
                raise ValueError(f"{where}, profile {profile!r}: {notebook.name} has no parameter {name!r}")
            if own[name] is not None and _kind(value) != _kind(own[name]):
                raise ValueError(f"{where}, profile {profile!r}: {name} is {value!r}, in {notebook.name} {own[name]!r}")


def _check_figures(writes: object, notebook: Path, where: str) -> None:
    if not isinstance(writes, dict):
        raise ValueError(f"{where}: writes is not a mapping of figures to captions; write {{}} for none")
    for stem, caption in writes.items():
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: figure {stem!r} has no caption")
        _check_name(stem, f"{where}: the name of a figure")
        if not stem.startswith(f"{notebook.stem}-"):
            raise ValueError(f"{where}: figure {stem!r} is not named '{notebook.stem}-...' after its notebook")


def _check_name(name: object, what: str) -> None:
    """Names become file names."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{what} is text made of letters, digits, dots, dashes and underscores, not {name!r}")


def _same_keys(given: Iterable, known: tuple[str, ...], what: str, where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown {what} {key!r}")
    for key in known:
        if key not in given:
            raise ValueError(f"{where}: {what} {key!r} is missing")


def _refuse_repeats(what: str, values: Iterable[str], where: object) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{where}: {what} {value!r} appears twice")
        seen.add(value)


def _kind(value: object) -> type:
    """Type that an override must share with the notebook's value: integers and floats are one, tuples are lists."""
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    return float if numbers else list if isinstance(value, tuple) else type(value)
