"""The gallery in `figures/README.md`: every figure with its caption, and what it was drawn with and when.

It is written anew between the comments `<!-- gallery -->` and `<!-- end -->`; what stands around it stays.
Captions are those of `notebooks/runs.yaml`. What a figure was drawn with stands in the picture itself, as a text of the
PNG that only `spear figures` writes: the gallery never says of a figure what was true of an earlier one, and says so of
one that a notebook run by hand has left there.
"""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spear.figures.table import Run

KEY = "spear"
GALLERY = re.compile(r"(?<=<!-- gallery -->\n).*?(?=<!-- end -->)", re.DOTALL)
EMPTY_PAGE = """# Figures

Written by `spear figures`; captions are in `notebooks/runs.yaml`.

<!-- gallery -->
<!-- end -->
"""
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
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    image, text, result = Image.open(io.BytesIO(picture)), PngInfo(), io.BytesIO()
    text.add_text(KEY, json.dumps(asdict(origin)))
    image.save(result, "png", pnginfo=text, dpi=image.info.get("dpi"))
    return result.getvalue()


def origin(picture: Path) -> Origin | None:
    """What `stamped` wrote into a PNG; `None` for one without. Raises `OSError` for a file that is no picture."""
    from PIL import Image

    with Image.open(picture) as image:
        text = image.text.get(KEY)
    return None if text is None else Origin(**json.loads(text))


def render(runs: Sequence[Run], folder: Path, page: str = EMPTY_PAGE) -> str:
    """The page of a folder of figures, in Markdown, its gallery anew: figures that are there, in the order of `runs`.

    `folder` is where the page is; links to the figures, in it or below it, are relative to it.

    Raises `ValueError` for a page without the comments that the gallery stands between.
    """
    if not GALLERY.search(page):
        raise ValueError(
            f"{folder / 'README.md'} has no lines '<!-- gallery -->' and '<!-- end -->': add them, or remove the file"
        )
    gallery = _times(runs) + "".join(_section(run, folder) for run in runs) + "\n"
    return GALLERY.sub(lambda _: gallery, page, count=1)


def _section(run: Run, folder: Path) -> str:
    """The figures of one run that are there; parameters are told once, as long as they stay the same."""
    pictures = {stem: run.folder / f"{stem}.png" for stem in run.captions}
    drawn = {stem: origin(place) for stem, place in pictures.items() if place.is_file()}
    if not drawn:
        return ""
    parts, told = [f"\n## [{run.label}]({os.path.relpath(run.notebook, folder)})\n"], None
    for stem, made in drawn.items():
        place = os.path.relpath(run.folder / stem, folder)
        caption = f"{run.captions[stem]}{_at_full_size(run, stem, folder, made)}"
        parts.append(f"\n![{stem}]({place}.png)\n\n{caption}\n\n[numbers]({place}.csv){_facts(made, told)}\n")
        told = made.parameters if made else told
    return "".join(parts)


def _at_full_size(run: Run, stem: str, folder: Path, made: Origin | None) -> str:
    """That a figure of profile quick is the small version, and where it is at full size, for which data set."""
    paper = run.folder / "paper"
    places = [place for place in (paper / f"{stem}.png", *sorted(paper.glob(f"*/{stem}.png"))) if place.is_file()]
    drawn = [origin(place) for place in places]
    if run.variant or any(made and full and made.parameters == full.parameters for full in drawn):
        return ""
    names = ["full size" if place.parent == paper else f"full size, {place.parent.name}" for place in places]
    links = [f"[{name}]({os.path.relpath(place, folder)})" for name, place in zip(names, places, strict=True)]
    return f" *Small version*: {', '.join(links)}." if links else " *Small version.*"


def _times(runs: Sequence[Run]) -> str:
    """What each run took, where that is kept beside its figures, and all together."""
    kept = [run for run in runs if run.profile == "paper" and run.record.is_file()]
    minutes = {run.label: json.loads(run.record.read_text())["seconds"] / 60 for run in kept}
    if not minutes:
        return ""
    rows = {**minutes, f"all {len(minutes)}, one after the other": sum(minutes.values())}
    return "\n| run | minutes |\n| --- | --- |\n" + "".join(f"| {name} | {x:.1f} |\n" for name, x in rows.items())


def _facts(made: Origin | None, told: Mapping[str, object] | None) -> str:
    if made is None:
        return f"; {BY_HAND}"
    data = f"data: {', '.join(made.data)}" if made.data else "no data set"
    values = ", ".join(f"{name} = {json.dumps(value)}" for name, value in made.parameters.items())
    parameters = "as above" if made.parameters == told else f"`{values}`"
    return f" of {made.date}; profile {made.profile}; {data}; parameters: {parameters}"
