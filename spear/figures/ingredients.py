"""What a run is made of: a change in any of it makes its figures due."""

import ast
import functools
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from spear import paths
from spear.data import known
from spear.figures.imports import Package
from spear.figures.notebook import code_cells
from spear.figures.table import Run

VERSIONS = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "scikit-image", "matplotlib")
NAMED = 4  # changes of one kind that are told by name


@dataclass(frozen=True)
class Ingredients:
    """Code cells without outputs, modules of the package that they reach, parameters, versions, and data.

    Cells and modules are told by digests, modules without comments and docstrings. `parameters` are those that override
    the notebook's, `data` the data sets at hand that parameters or cells name, and the tables that cells name, of
    benchmarks or figures, each by a digest.
    Nothing in it depends on the machine or the day.
    """

    cells: list[str]
    parameters: Mapping[str, object]
    modules: Mapping[str, str]
    versions: Mapping[str, str]
    data: Mapping[str, str]

    def changes(self, before: Mapping[str, object]) -> Iterator[str]:
        """In words, what is another than in an earlier run's, which is given as `dataclasses.asdict` made it."""
        changed = sum(cell not in before["cells"] for cell in self.cells)
        if self.cells != before["cells"]:
            yield f"cells: {changed} new" if changed else "cells: moved or removed"
        for kind in ("parameters", "modules", "versions", "data"):
            now, then = getattr(self, kind), before[kind]
            names = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
            if names:
                rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                yield f"{kind}: {', '.join(names[:NAMED])}{rest}"


def of(run: Run) -> Ingredients:
    """What the run is made of now."""
    cells, package = [cell.source for cell in code_cells(run.notebook)], Package()
    code = "\n".join(cells)
    return Ingredients(
        [digest(cell.encode()) for cell in cells],
        run.parameters,
        {name: _digest_of_module(package.files[name]) for name in package.reached(code)},
        {"python": ".".join(platform.python_version_tuple()[:2])} | {name: version(name) for name in VERSIONS},
        {name: _digest_of_data(place) for name in _named(run, code) if (place := known.place(name))} | _tables(code),
    )


def digest(content: bytes) -> str:
    """Bytes in short."""
    return hashlib.sha256(content).hexdigest()


def _digest_of_module(module: Path) -> str:
    """Of its code, and of files of the same name beside it, such as a template."""
    beside = sorted(path for path in module.parent.glob(f"{module.stem}.*") if path != module)
    return digest(b"".join([_code(module.read_text(encoding="utf-8")), *(path.read_bytes() for path in beside)]))


@functools.cache
def _code(source: str) -> bytes:
    """What of a module's source runs, comments, docstrings and layout aside; all of it where it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source.encode()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def _digest_of_data(place: Path) -> str:
    """Of a file's content, or of the names and sizes of the many in a folder."""
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    sizes = {str(path.relative_to(place)): path.stat().st_size for path in place.rglob("*") if path.is_file()}
    return digest(json.dumps(sizes, sort_keys=True).encode())


def _tables(code: str) -> dict[str, str]:
    """The tables that code names, each as a string of its own: of benchmarks, or by the place under the root."""
    named = {f"{folder}{name}" for name in re.findall(r'"([\w./-]+\.csv)"', code) for folder in ("benchmarks/", "")}
    places = {name: paths.root() / name for name in sorted(named)}
    return {name: digest(place.read_bytes()) for name, place in places.items() if place.is_file()}


def _named(run: Run, code: str) -> list[str]:
    """The data sets that parameters or code name, as a string of its own."""
    words = f"{code} {json.dumps(run.parameters)}"
    names = dict.fromkeys((*known.names(), *([run.dataset] if run.dataset else [])))
    return [name for name in names if re.search(rf"[\"']{re.escape(name)}[\"']", words)]
