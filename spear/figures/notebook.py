"""A notebook file as its cells, read as the JSON that it is: nbformat takes seconds to import beside JupyterLab."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A code cell: its source, metadata and outputs."""

    source: str
    metadata: Mapping[str, object]
    outputs: Sequence[Mapping[str, object]]


def code_cells(notebook: Path) -> list[Cell]:
    """The code cells of a notebook of format 4, in order. Raises `ValueError` naming a file that is none."""
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        return [_cell(cell) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{notebook}: no notebook of format 4 ({type(error).__name__}: {error})") from error


def _cell(content: dict) -> Cell:
    source, metadata, outputs = content["source"], content["metadata"], content["outputs"]
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tags", []), list):
        raise TypeError("a cell's metadata are no mapping, or its tags no list")
    if not isinstance(outputs, list):
        raise TypeError("a cell's outputs are no list")
    return Cell(_text(source), metadata, outputs)


def _text(source: Any) -> str:
    """Text that a notebook may hold as one string or as its lines."""
    return source if isinstance(source, str) else "".join(source)
