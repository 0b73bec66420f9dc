"""The gallery, `figures/README.md`: every figure with its caption, and what it was drawn with and when.

Captions are those of `notebooks/runs.yaml`. What a figure was drawn with stands in the picture itself, as a text of the
PNG that only `spear figures` writes: the gallery never says of a figure what was true of an earlier one, and says so of
one that a notebook run by hand has left there.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spear.figures.table import Run

KEY = "spear"
BY_HAND = "drawn by hand: neither parameters nor date are recorded"


@dataclass(frozen=True)
class Origin:
    """What a figure was drawn with: profile, all parameters of its notebook, data sets at hand, and the day (ISO)."""

    profile: str
    parameters: Mapping[str, object]
    data: Sequence[str]
    date: str


def stamped(picture: bytes, origin: Origin) -> bytes:
    """A PNG with its origin as a text inside; pixels and resolution stay, other texts go."""
    image, text, result = Image.open(io.BytesIO(picture)), PngInfo(), io.BytesIO()
    text.add_text(KEY, json.dumps(asdict(origin)))
    image.save(result, "png", pnginfo=text, dpi=image.info.get("dpi"))
    return result.getvalue()


def origin(picture: Path) -> Origin | None:
    """What `stamped` wrote into a PNG; `None` for one without. Raises `OSError` for a file that is no picture."""
    with Image.open(picture) as image:
        text = image.text.get(KEY)
    return None if text is None else Origin(**json.loads(text))


def render(runs: Sequence[Run], folder: Path) -> str:
    """The page of a folder of figures, in Markdown: those of `runs` that are there, in the table's order."""
    parts = ["# Figures\n\nWritten by `spear figures`; captions are in `notebooks/runs.yaml`.\n"]
    for run in runs:
        drawn = [stem for stem in run.captions if (folder / f"{stem}.png").is_file()]
        if drawn:
            parts.append(f"\n## [{run.name}]({os.path.relpath(run.notebook, folder)})\n")
        parts += [_figure(stem, run.captions[stem], origin(folder / f"{stem}.png")) for stem in drawn]
    return "".join(parts)


def _figure(stem: str, caption: str, drawn: Origin | None) -> str:
    numbers = f"[numbers]({stem}.csv)"
    if drawn is None:
        return f"\n![{stem}]({stem}.png)\n\n{caption}\n\n{numbers}; {BY_HAND}\n"
    data = f"data: {', '.join(drawn.data)}" if drawn.data else "no data set"
    values = ", ".join(f"{name} = {json.dumps(value)}" for name, value in drawn.parameters.items())
    facts = f"{numbers} of {drawn.date}; profile {drawn.profile}; {data}; parameters: `{values}`"
    return f"\n![{stem}]({stem}.png)\n\n{caption}\n\n{facts}\n"
