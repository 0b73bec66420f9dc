"""Model files: the rebuilt model is the saved one, and a hostile or damaged file is one clear line, never run."""

import io
import json
import pickle
import random
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from spear import federated, models
from spear.models import files, tracing

SHAPE = (1, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")  # archives remain


class Mixed(nn.Module):
    """Convolution, normalisation, pooling, a residual branch, several activations, dropout; sizes taken at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Sequential(nn.Linear(48, 20), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.LayerNorm(20))
        self.side = nn.Linear(20, 20, bias=False)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.gelu(self.norm(self.conv(x))), 2)
        x = self.body(x.view(x.size(0), -1))
        return self.head(x + torch.sigmoid(self.side(x)))


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.reshape(x.shape[0], 64))))


MODELS = {
    "chain": lambda: models.fcnn(SHAPE, 12, 3, 4, dtype=torch.float32),
    "double": lambda: models.fcnn(SHAPE, 12, 3, 4, bias=False),
    "mixed": Mixed,
    "reshaped": Reshaped,
}


def batch(count: int, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *SHAPE, generator=generator, dtype=next(model.parameters()).dtype)


def script(model: nn.Module, path: Path) -> None:
    torch.jit.script(model).save(path)


def trace(model: nn.Module, path: Path) -> None:
    torch.jit.trace(model, batch(3, model)).save(path)


def export(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (batch(3, model),)), path)


def export_any_batch(model: nn.Module, path: Path) -> None:
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model, (batch(3, model),), dynamic_shapes=dynamic), path)


SAVERS: dict[str, Callable[[nn.Module, Path], None]] = {
    "script": script,
    "trace": trace,
    "export": export,
    "export_any_batch": export_any_batch,
}
every_saver = pytest.mark.parametrize("saver", SAVERS.values(), ids=SAVERS)


@every_saver
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_rebuilt_model_is_the_saved_one(tmp_path: Path, make: Callable, saver: Callable) -> None:
    model = make().eval()
    saver(model, tmp_path / "model.pt2")
    loaded = files.load(str(tmp_path / "model.pt2"), run_code=True)
    inputs, labels = batch(7, model), torch.arange(7) % 4
    assert torch.equal(loaded.module(inputs), model(inputs))
    expected = federated.gradient(model, inputs, labels).gradients
    found = federated.gradient(loaded.module, inputs, labels).gradients
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    key = lambda layer: (layer.name, layer.relu, layer.from_data, layer.tail is None)  # noqa: E731
    try:
        wanted = [key(layer) for layer in tracing.linear_layers(model)]
    except ValueError:  # torch.fx cannot trace every module that can be saved
        wanted = [key(layer) for layer in tracing.linear_layers(loaded.module)]
    assert [key(layer) for layer in tracing.linear_layers(loaded.module)] == wanted
    assert loaded.input_shape in (None, SHAPE)
    assert (loaded.input_shape == SHAPE) == saver.__name__.startswith("export")


@every_saver
def test_weights_of_another_file(tmp_path: Path, saver: Callable) -> None:
    model, other = (models.fcnn(SHAPE, 12, 3, 4, seed=seed).eval() for seed in (0, 1))
    saver(model, tmp_path / "model.pt2")
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    loaded = files.load(str(tmp_path / "model.pt2"), tmp_path / "other.safetensors", run_code=True)
    assert torch.equal(loaded.module(batch(2, other)), other(batch(2, other)))
    save_file(models.fcnn(SHAPE, 13, 3, 4).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors: Error\(s\) in loading state_dict"):
        files.load(str(tmp_path / "model.pt2"), tmp_path / "wide.safetensors", run_code=True)


class Constants(nn.Module):
    """A buffer that is not saved with the weights, a constant, a cast, and ReLU as a statement."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 9), nn.Linear(9, 4)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x.to(torch.float32).flatten(1) / self.scale)
        z.relu_()
        return self.last(z) * torch.tensor([1.0, 2.0, 3.0, 4.0])


class Tied(nn.Module):
    """Two layers that share their weights, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(64, 9), nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 4)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.c(self.b(self.a(x.flatten(1)).relu()).relu()).relu())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(9)
        norm.running_mean += 0.5
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def export_decomposed(model: nn.Module, path: Path) -> None:
    torch.export.save(torch.export.export(model, (batch(3, model),)).run_decompositions(), path)


@pytest.mark.parametrize("saver", [export, export_any_batch, export_decomposed])
@pytest.mark.parametrize("make", [*MODELS.values(), Constants, Tied, Normed])
def test_an_exported_program_in_every_form(tmp_path: Path, make: Callable, saver: Callable) -> None:
    torch.manual_seed(0)
    model = make().eval()
    saver(model, tmp_path / "model.pt2")
    read = files.load(str(tmp_path / "model.pt2")).module
    inputs, labels = batch(7, model), torch.arange(7) % 4
    torch.testing.assert_close(read(inputs), model(inputs))
    expected = federated.gradient(model, inputs, labels).gradients
    found = federated.gradient(read, inputs, labels).gradients
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    wanted = [(layer.name, layer.relu, layer.from_data) for layer in tracing.linear_layers(model)]
    assert [(layer.name, layer.relu, layer.from_data) for layer in tracing.linear_layers(read)] == wanted


class Hostile:
    """Unpickling an instance leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def refused(path: Path, message: str, *, run_code: bool = False) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        files.load(str(path), run_code=run_code)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    torch.save(Hostile(mark), path)
    refused(path, "a pickle, which could run code when it is loaded; save the model by torch.export.save")
    torch.save(Hostile(mark), path, _use_new_zipfile_serialization=False)
    refused(path, "no exported program; save the model by torch.export.save")
    path.write_bytes(pickle.dumps(Hostile(mark)))
    refused(path, "no exported program")
    assert not mark.exists()


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Pass every entry of an archive through `change(name, content)`."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def in_json(ending: str, change: Callable[[dict], None]) -> Callable[[str, bytes], bytes]:
    def apply(name: str, content: bytes) -> bytes:
        if not name.endswith(ending):
            return content
        parsed = json.loads(content)
        change(parsed)
        return json.dumps(parsed).encode()

    return apply


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    export(models.fcnn(SHAPE, 12, 3, 4).eval(), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_what_is_pickled_in_an_exported_program_is_not_read(tmp_path: Path, exported: Path) -> None:
    mark, evil = tmp_path / "mark", io.BytesIO()
    torch.save(Hostile(mark), evil)
    rewritten(exported, lambda name, content: evil.getvalue() if name.endswith("sample_inputs/model.pt") else content)
    assert files.load(str(exported)).input_shape == SHAPE
    pickled = in_json("weights_config.json", lambda c: c["config"]["fc1.weight"].update(use_pickle=True))
    rewritten(exported, lambda name, content: evil.getvalue() if name.endswith("/weight_0") else pickled(name, content))
    refused(exported, "some of its weights are pickled, which could run code when they are loaded")
    assert not mark.exists()


def _node(program: dict, target: str) -> dict:
    return next(node for node in program["graph_module"]["graph"]["nodes"] if target in node["target"])


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        (
            "model.json",
            lambda p: p["schema_version"].update(major=9),
            "an exported program of schema 9; schema 8 is read",
        ),
        ("model.json", lambda p: _node(p, "relu").update(target="torch.ops.aten.from_file.default"), "aten::from_file"),
        ("model.json", lambda p: _node(p, "relu").update(target="torch.hub.load"), "uses torch.hub.load"),
        ("model.json", lambda p: p["graph_module"]["graph"]["outputs"].append(1), "1 inputs and 2 outputs"),
        ("model.json", lambda p: p.pop("graph_module"), "damaged, or not as torch writes it ('graph_module')"),
        ("weights_config.json", lambda c: c["config"].pop("fc1.weight"), "damaged"),
        ("weights_config.json", lambda c: c["config"]["fc1.weight"]["tensor_meta"].update(dtype=99), "damaged"),
        (
            "weights_config.json",
            lambda c: c["config"]["fc1.weight"]["tensor_meta"].update(sizes=[{"as_int": 10**6}, {"as_int": 64}]),
            "a weight of shape (1000000, 64) from 768 numbers",
        ),
    ],
)
def test_a_changed_program(exported: Path, ending: str, change: Callable, message: str) -> None:
    rewritten(exported, in_json(ending, change))
    refused(exported, message)


def test_a_model_in_training_mode(tmp_path: Path) -> None:
    export(Mixed().train(), tmp_path / "model.pt2")
    model = files.load(str(tmp_path / "model.pt2")).module
    with pytest.raises(ValueError, match=r"the client trained with dropout \(p = 0.3\) on behind body.0"):
        tracing.find_layer(model, "body.0")
    with pytest.raises(ValueError, match="the client trained with batch normalisation on before body.0"):
        tracing.find_layer(model)


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + torch.from_file("mark", shared=True, size=64)


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            return x.flatten(1)
        return -x.flatten(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Writing(), "the model uses aten::from_file, which is not rebuilt from files"),
        (Deciding(), "the model uses prim::If, which is not rebuilt from files"),
    ],
)
def test_torchscript_that_is_not_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    script(model, Path("model.ts"))
    refused(Path("model.ts"), message, run_code=True)
    assert not Path("mark").exists()


def test_code_runs_only_where_the_caller_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harmless archive and a harmless factory: without `run_code` neither is handed to what would run it."""
    script(models.fcnn(SHAPE, 12, 2, 4), tmp_path / "model.ts")
    (tmp_path / "harmless_factory.py").write_text("import torch\nmodel = lambda: torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the loader was called"))
    refused(
        tmp_path / "model.ts", "a TorchScript archive is a program, which is not run; save the model by torch.export"
    )
    with pytest.raises(ValueError, match="harmless_factory:model: a factory is code, which is not run; .*--run-code"):
        files.load("harmless_factory:model")
    assert "harmless_factory" not in sys.modules
    assert isinstance(files.load("harmless_factory:model", run_code=True).module, nn.Linear)


def test_an_archive_that_unpacks_to_more_than_its_size(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/models/model.json", b" " * 1000)
    refused(tmp_path / "packed.pt2", "its entries are compressed, which torch does not do")


def test_weights_larger_than_their_file(exported: Path) -> None:
    """A weight of stride 0, or one entry under many names, would be as large as its shape says."""

    def repeat(config: dict) -> None:
        meta = config["config"]["fc1.weight"]["tensor_meta"]
        meta["strides"] = [{"as_int": 0}, {"as_int": 0}]
        meta["sizes"][0] = {"as_int": 10**4}

    def share(config: dict) -> None:
        weight = config["config"]["fc1.weight"]
        config["config"] |= {f"more{k}": weight for k in range(10**3)}

    whole = exported.read_bytes()
    rewritten(exported, in_json("weights_config.json", repeat))
    refused(exported, "a weight of shape (10000, 64) from 768 numbers")
    exported.write_bytes(whole)
    rewritten(exported, in_json("weights_config.json", share))
    refused(exported, "its weights are more than 16 times as large as the file")


class Expanding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.first(x.flatten(1)))
        return self.last(z + z[:, :, None].expand(-1, 8, 1000).sum(2))


def test_a_model_that_expands_its_input_beyond_measure(tmp_path: Path) -> None:
    """The size of an expansion, changed in the file: it is seen from the shapes, before anything is computed."""
    path = tmp_path / "model.pt2"
    export(Expanding().eval(), path)
    assert files.load(str(path)).input_shape == SHAPE

    def enlarge(program: dict) -> None:
        sizes = next(a["arg"] for a in _node(program, "expand")["inputs"] if "as_ints" in a["arg"])
        sizes["as_ints"][-1] = 10**9

    rewritten(path, in_json("model.json", enlarge))
    refused(path, "numbers of a sample or two")


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a/b.txt", "text")
    refused(tmp_path / "other.zip", "an archive of another kind; save the model by torch.export.save")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("model/serialized_exported_program.json", "{}")
    refused(tmp_path / "old.pt2", "written by a torch before 2.8, with pickled weights; nothing is unpickled")
    with zipfile.ZipFile(tmp_path / "eight.pt2", "w") as archive:
        for name in ("models/model.json", "data/weights/model.pt", "data/constants/model.pt"):
            archive.writestr(f"eight/{name}", "{}")
    refused(tmp_path / "eight.pt2", "written by torch 2.8, whose archives hold the weights as a pickle; nothing is")
    with pytest.raises(FileNotFoundError, match="none.pt2: no such file"):
        files.load(str(tmp_path / "none.pt2"))


@pytest.mark.parametrize("saver", [script, export])
def test_damaged_files_are_one_clear_line(tmp_path: Path, saver: Callable) -> None:
    path = tmp_path / "model.pt2"
    saver(models.fcnn(SHAPE, 12, 2, 4).eval(), path)
    whole, chance, lines = path.read_bytes(), random.Random(0), []
    for _ in range(30):
        damaged = bytearray(whole)
        if chance.random() < 0.3:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            for _ in range(chance.choice((1, 8, 200))):
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            files.load(str(path), run_code=saver is script)  # what was hit was padding, or an entry that is not read
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 10
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
