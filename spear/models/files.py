"""Models by name: a TorchScript archive, a `torch.export` program, or a factory that can be imported.

A file may come from anyone: nothing in it is run, and Python unpickles nothing. Of an exported program the graph (JSON)
and the weights (raw bytes) are read here, because `torch.export.load` unpickles. A TorchScript archive is opened by
`torch.jit.load`, whose reader in C++ makes tensors, containers and the archive's own classes, never a Python object;
that reader is what safety rests on, so archives whose classes would run code on loading (`__setstate__`) or that name
C++ classes are refused before it sees them. A factory is code that you ask for by name, and it is run.
"""

import importlib
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spear.models import archives
from spear.models.rebuild import Rebuilt
from spear.models.tensors import read_tensors

SAVE_INSTEAD = "save the model by torch.export.save or torch.jit.save"
EXPANSION = 20  # least ratio of unpacked to packed bytes that no honest archive reaches


@dataclass(frozen=True)
class Loaded:
    """A model, and the shape of one sample where its file says it."""

    module: nn.Module
    input_shape: tuple[int, ...] | None


def load(name: str, weights: Path | None = None) -> Loaded:
    """The model behind `name`: a file, or PACKAGE.MODULE:FACTORY; `weights`, safetensors, replace its parameters.

    The factory is called without arguments; the working directory is importable. Raises `FileNotFoundError` where
    there is no such file, and `ValueError`, in one line, for whatever else is wrong.
    """
    model = Loaded(factory(name), None) if ":" in name and not Path(name).exists() else read(Path(name))
    if weights is not None:
        tensors, _ = read_tensors(weights)
        try:
            model.module.load_state_dict(tensors, assign=True)  # assign: in the precision of the file
        except RuntimeError as error:
            raise ValueError(f"{weights}: {error}") from error
    return model


def factory(name: str) -> nn.Module:
    """What the factory PACKAGE.MODULE:FACTORY returns. Raises `ValueError` for whatever goes wrong in it."""
    sys.path.insert(0, os.getcwd())
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"{name!r} is not of the form package.module:factory")
    try:
        model = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # the user's own code may raise anything
        raise ValueError(f"model {name}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name}: returned {type(model).__name__}, not a torch.nn.Module")
    return model


def read(path: Path) -> Loaded:
    """The model of a TorchScript archive or an exported program, rebuilt from its graph (see the module's docstring).

    Raises as `load` does: for a pickle, a file that is damaged or of another kind, and a model that cannot be rebuilt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, nor of the form package.module:factory")
    try:
        rebuilt = _reader(path)(path)
        return Loaded(rebuilt.module, rebuilt.input_shape)
    except Exception as error:  # a damaged file may fail anywhere in the readers
        detail = " ".join(str(error).split())[:200]
        why = detail if isinstance(error, ValueError) else f"damaged, or not as torch writes it ({detail})"
        raise ValueError(f"{path}: {why}") from error


def _reader(path: Path) -> Callable[[Path], Rebuilt]:
    """What reads the file, by the entries of the archive that it is."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"neither a TorchScript archive nor an exported program; {SAVE_INSTEAD}")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > EXPANSION * path.stat().st_size:
        raise ValueError(f"unpacks to more than {EXPANSION} times its size")
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "models/model.json" in names:
        return archives.exported
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        return archives.scripted
    if "serialized_exported_program.json" in names:
        raise ValueError("exported by a torch before 2.9, with pickled weights: export it again")
    kind = "a pickle, which could run code when it is loaded" if "data.pkl" in names else "an archive of another kind"
    raise ValueError(f"{kind}; {SAVE_INSTEAD}")
