"""Models by name: a `torch.export` program, or, where its code may run, a TorchScript archive or a factory.

A file may come from anyone: nothing in it is run, and nothing is unpickled. Of an exported program the graph (JSON) and
the weights (raw bytes) are read here, because `torch.export.load` unpickles; no more memory is taken than the file is
large. A TorchScript archive is a program: its loader, `torch.jit.load`, runs code of the file. A factory is code that
is asked for by name. Neither is touched unless the caller says `run_code`.
"""

import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spear.models import archives, expansion
from spear.models.rebuild import Rebuilt
from spear.models.tensors import read_tensors

SAVE_INSTEAD = "save the model by torch.export.save"
EXPORT_AGAIN = "nothing is unpickled: load it where you trust it, and save it with torch 2.9 or newer"
SHARED = 16  # times that the same weights may be used, on average
UNKNOWN = 64  # pixels or entries in a dimension that a file leaves open
MAY_RUN = "where you trust it, --run-code (run_code=True) lets it run"


@dataclass(frozen=True)
class Loaded:
    """A model, and the shape of one sample where its file says it."""

    module: nn.Module
    input_shape: tuple[int, ...] | None


def load(name: str, weights: Path | None = None, *, run_code: bool = False) -> Loaded:
    """The model behind `name`: a file, or PACKAGE.MODULE:FACTORY; `weights`, safetensors, replace its parameters.

    `run_code` says that code of the model may run: that of a factory, called without arguments (the working directory
    is importable), or of a TorchScript archive. Raises `FileNotFoundError` where there is no such file, and
    `ValueError`, in one line, for whatever else is wrong, code that may not run among it.
    """
    if ":" in name and not Path(name).exists():
        model = Loaded(factory(name, run_code=run_code), None)
    else:
        model = read(Path(name), run_code=run_code)
    if weights is not None:
        tensors, _ = read_tensors(weights)
        try:
            model.module.load_state_dict(tensors, assign=True)  # assign: in the precision of the file
        except RuntimeError as error:
            raise ValueError(f"{weights}: {error}") from error
    return model


def factory(name: str, *, run_code: bool = False) -> nn.Module:
    """What the factory PACKAGE.MODULE:FACTORY returns. Raises `ValueError` for whatever goes wrong in it."""
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"{name!r} is not of the form package.module:factory")
    if not run_code:
        raise ValueError(f"model {name}: a factory is code, which is not run; {MAY_RUN}, or {SAVE_INSTEAD}")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module_name), factory_name)()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, or end like a script
        raise ValueError(f"model {name}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name}: returned {type(model).__name__}, not a torch.nn.Module")
    return model


def read(path: Path, *, run_code: bool = False) -> Loaded:
    """The model of an exported program or, with `run_code`, of a TorchScript archive, rebuilt from its graph.

    Raises as `load` does: for a pickle, a file that is damaged or of another kind, and a model that cannot be rebuilt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, nor of the form package.module:factory")
    try:
        rebuilt = _reader(path, run_code)(path)
        _check_expansion(rebuilt, path.stat().st_size)
        return Loaded(rebuilt.module, rebuilt.input_shape)
    except Exception as error:  # a damaged file may fail anywhere in the readers
        detail = " ".join(str(error).split())[:200]
        why = detail if isinstance(error, ValueError) else f"damaged, or not as torch writes it ({detail})"
        raise ValueError(f"{path}: {why}") from error


def _check_expansion(rebuilt: Rebuilt, size: int) -> None:
    """Raises `ValueError` for a model whose weights or values are out of proportion to its file of `size` bytes."""
    if sum(t.numel() * t.element_size() for t in rebuilt.tensors.values()) > SHARED * size:
        raise ValueError(f"its weights are more than {SHARED} times as large as the file")
    shape = tuple(UNKNOWN if n is None else n for n in rebuilt.sizes)
    if shape and not expansion.computes(rebuilt.module, shape):
        raise ValueError(f"it cannot be computed for inputs of the shape {shape} that it was saved with")


def _reader(path: Path, run_code: bool) -> Callable[[Path], Rebuilt]:
    """What reads the file, by the entries of the archive that it is."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"no exported program; {SAVE_INSTEAD}")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names and any(name.startswith("code/") for name in names):
        if not run_code:
            raise ValueError(f"a TorchScript archive is a program, which is not run; {SAVE_INSTEAD}; {MAY_RUN}")
        return archives.scripted
    if any(name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt") for name in names):
        raise ValueError(f"written by torch 2.8, whose archives hold the weights as a pickle; {EXPORT_AGAIN}")
    if "models/model.json" in names:
        _check_size(entries, path.stat().st_size)
        return archives.exported
    if "serialized_exported_program.json" in names:
        raise ValueError(f"written by a torch before 2.8, with pickled weights; {EXPORT_AGAIN}")
    kind = "a pickle, which could run code when it is loaded" if "data.pkl" in names else "an archive of another kind"
    raise ValueError(f"{kind}; {SAVE_INSTEAD}")


def _check_size(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raises `ValueError` unless the entries lie in the file as they are, and together are no larger than it."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"its entries are compressed, which torch does not do; {SAVE_INSTEAD}")
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
        raise ValueError(f"its entries say that they are larger than the file; {SAVE_INSTEAD}")
