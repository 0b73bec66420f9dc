"""Where things are, and how files get there: the one place that knows, for package, notebooks and runner alike."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


def root() -> Path:
    """Folder that everything else is in: the nearest checkout at or above the working directory.

    A checkout is told by its ``notebooks/runs.yaml``. Away from any, it is the checkout the package was imported
    from, and for a package installed without one the working directory.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks" / "runs.yaml").is_file():
            return folder
    return here


def data_root() -> Path:
    """Folder of downloads and sample packs: ``$SPEAR_DATA``, or ``data`` under the root."""
    return _from_environment("SPEAR_DATA", "data")


def figures() -> Path:
    """Folder that figures and their numbers are written to: ``$SPEAR_FIGURES``, or ``figures`` under the root."""
    return _from_environment("SPEAR_FIGURES", "figures")


def notebooks() -> Path:
    """Folder of the notebooks and ``runs.yaml``."""
    return root() / "notebooks"


def write(contents: Mapping[Path, bytes]) -> None:
    """Write files whole, each by one rename after all were written beside their places; leave nothing else behind."""
    parts = {path: _part(path) for path in contents}
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(contents[path])
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """Refuse, before the work, outputs that `write` could not write in the end, or that would replace an input.

    `None` is an output that is not asked for, or an input that is not given. Raises `OSError` for a folder that is not
    there or cannot be written to, and for what is no regular file; `ValueError` for a path that is given twice.
    """
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in taken:
            raise ValueError(f"{path}: given twice, to be written and for something else")
        taken.add(path.resolve())
        _check_place(path)


def _check_place(path: Path) -> None:
    """Raises `OSError` where `write` could not write the file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: {'a folder' if path.is_dir() else 'no regular file'}: it cannot be written to")
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error


def _part(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    return path.with_name(f".{path.name}.part")


def _from_environment(variable: str, default: str) -> Path:
    named = os.environ.get(variable)
    return Path(named).resolve() if named else root() / default
