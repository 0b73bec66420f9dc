"""What code reaches of a package, read off its sources: as much as the import system loads, and no face as a whole."""

import sys
from pathlib import Path

import grimp
import pytest

from spear.figures.imports import Package

MODULES = {
    "__init__": """
        import lazy_loader
        a, b, c = lazy_loader.attach(__name__, submodules=["face"], submod_attrs={"top": ["attack"], "face": ["f"]})
    """,
    "top": "from pack.low import ground",
    "low/__init__": '"""Empty."""',
    "low/ground": "import torch",
    "low/late": "def f():\n    from pack.low import ground",
    "low/cycle": "import pack.low.cycle, pack.low.late",
    "face/__init__": """
        import lazy_loader
        a, b, c = lazy_loader.attach(__name__, submod_attrs={"inner": ["load", "Thing"], "other": ["names"]})
    """,
    "face/inner": "",
    "face/other": "from pack import top",
}
LOW, FACE, TOP = {"low", "low.ground"}, {"face", "face.inner"}, {"top", "low", "low.ground"}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("made") / "pack"
    for name, source in MODULES.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line.removeprefix(" " * 8) for line in source.splitlines()))
    return Package(folder)


@pytest.mark.parametrize(
    ("source", "reached"),
    [
        ("", None),
        ("import torch, packing", None),
        ("import pack", set()),
        ("import pack.low", {"low"}),
        ("import pack.low.ground", LOW),
        ("from pack.low import ground", LOW),
        ("from pack.low.ground import x", LOW),
        ("from pack.low import late", LOW | {"low.late"}),
        ("from pack.low import cycle", LOW | {"low.late", "low.cycle"}),
        ("def f():\n    from pack.low import ground", LOW),
        ("from pack import attack", TOP),
        ("import pack\npack.attack(1)", TOP),
        ("import pack as p\np.attack", TOP),
        ("import pack\npack.nothing", set()),
        ("from pack import face", {"face"}),
        ("from pack import face\nface.load(1).names", FACE),
        ("from pack import face as g\ng.Thing", FACE),
        ("from pack import face\nface.names()", TOP | {"face", "face.other"}),
        ("from pack.face import load", FACE),
        ("import pack\npack.face.load(2)", FACE),
        ("import pack.face as g\ng.load.x", FACE),
        ("from pack import face\nprint(face)", FACE | TOP | {"face.other"}),
        ("from pack.face import Thing\nThing.names", FACE),
    ],
)
def test_reached_is_what_is_imported_or_used(package: Package, source: str, reached: set[str] | None) -> None:
    expected = [] if reached is None else sorted({"pack"} | {f"pack.{name}" for name in reached})
    assert package.reached(source) == expected


@pytest.mark.parametrize("source", ["!pip install it", "import pack\n%timeit 1", "def"])
def test_what_cannot_be_read_reaches_everything(package: Package, source: str) -> None:
    assert package.reached(source) == sorted(package.files)


def test_modules_reach_what_the_import_linters_graph_says() -> None:
    package, graph = Package(), grimp.build_graph("spear")
    assert set(package.files) == graph.modules
    for module in graph.modules:
        assert set(package.reached(f"import {module}")) >= graph.find_upstream_modules(module)


def test_what_is_imported_already_was_reached() -> None:
    package = Package()
    loaded = {name for name in sys.modules if name.split(".")[0] == "spear"}
    assert loaded <= set(package.reached("\n".join(f"import {name}" for name in loaded)))


def test_notebooks_reach_what_they_are_about(repository: Path) -> None:
    from spear.figures.notebook import code_cells

    def reached(stem: str) -> set[str]:
        code = [cell.source for cell in code_cells(repository / "notebooks" / f"{stem}.ipynb")]
        return set(Package().reached("\n".join(code)))

    sampling, audit = reached("04_sampling"), reached("14_audit")
    assert {"spear.published.sampling", "spear.data.catalog", "spear.plots"} <= sampling
    assert not {name for name in sampling if name.split(".")[1:2] in (["audit"], ["network"], ["cli"], ["figures"])}
    assert {"spear.audit.assessment", "spear.inversion", "spear.network.whole_batch"} <= audit
