"""An environment for each framework: pinned packages of its own, torch and what goes with it lent by the runner's."""

import os
import subprocess
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

LENT = "torch torchvision numpy scipy scikit-learn pandas safetensors opacus packaging pyyaml requests"
PINNED = {  # after "--no-deps", without dependencies where these are far more than what the classes here import
    "flower": "flwr==1.42.0",
    "nvflare": "nvflare==2.9.0 --no-deps bitsandbytes==0.50.2",
    "openfl": "openfl==1.9 numpy==2.0.2",
    "appfl": """omegaconf==2.3.0 wandb==0.23.0 colorama==0.4.6 zfpy==1.0.1.post0 zstd==1.5.7.2 blosc==1.11.4
        --no-deps appfl==1.12.0""",
    "fedbiomed": """msgpack==1.1.2 polars==2.1.0 nibabel==5.4.2 fire==0.7.1 gmpy2==2.1.5 cryptography==40.0.2
        tqdm==4.70.1 tinydb==4.7.1 persist-queue==0.5.1 validators==0.20.0 tabulate==0.9.0 python-minifier==2.11.3
        --no-deps fedbiomed==6.4.1 declearn==2.8.0""",
    "declearn": "declearn[websockets]==2.9.1",
    "pfl": "pfl==0.6.0",
    "plato": "zstd==1.5.7.2 --no-deps plato-learn==1.0",
}


def make(name: str, folder: Path) -> Path:
    """The Python of a framework's environment in `folder`, made if it is not whole there."""
    python, ready = folder / ("Scripts" if os.name == "nt" else "bin") / "python", folder / "ready"
    words = PINNED[name].split()
    if ready.is_file() and ready.read_text(encoding="utf-8").split() == words:
        return python
    venv.create(folder, clear=True, with_pip=True)
    own = next(folder.rglob("site-packages"))
    (own / "zz_lent.pth").write_text(str(lend(folder / "lent")), encoding="utf-8")  # after the environment's own
    for part in installations(words):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *part], check=True)
    ready.write_text(PINNED[name], encoding="utf-8")
    return python


def installations(words: list[str]) -> Iterator[list[str]]:
    """What is installed with its dependencies, up to `--no-deps`, and what without them."""
    place = words.index("--no-deps") if "--no-deps" in words else len(words)
    yield from filter(None, (words[:place], words[place:]))


def lend(folder: Path) -> Path:
    """A folder of links to `LENT` and what they require, in this environment: torch is too large to install again."""
    folder.mkdir(parents=True, exist_ok=True)
    for found in required(LENT.split()).values():
        tops = {file.parts[0] for file in found.files or () if file.parts[0] != ".." and file.parts[0] != "__pycache__"}
        for top in tops:
            link = folder / top
            if not link.exists():
                link.symlink_to(found.locate_file(top))
    return folder


def required(names: list[str]) -> dict[str, Distribution]:
    """Distributions that are installed here, by name, and all that they require."""
    found: dict[str, Distribution] = {}
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        wanted = map(Requirement, found[name].requires or ())
        names += [need.name for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found
