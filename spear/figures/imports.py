"""Which modules of this package code reaches, directly or through one another: read off the sources, none imported.

Imports inside functions count. Of a lazy face (`lazy_loader.attach` in an `__init__`) only what is used counts, as far
as names tell: with `from spear import data`, `data.load` reaches the module behind `load`, and `data` by itself all of
the face. Code that builds names of modules at run time is beyond this.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
WHOLE = "*"  # ends a dotted name that is used as a whole


class Package:
    """The modules of the package in a folder, by their dotted names."""

    def __init__(self, folder: Path = PACKAGE) -> None:
        self.name = folder.name
        parts = {path: path.relative_to(folder.parent).with_suffix("").parts for path in sorted(folder.rglob("*.py"))}
        self.files = {".".join(p[:-1] if p[-1] == "__init__" else p): path for path, p in parts.items()}
        self._sources = {name: path.read_text(encoding="utf-8") for name, path in self.files.items()}

    def reached(self, source: str) -> list[str]:
        """The modules that a source reaches, in order of name; all of them where it cannot be parsed."""
        found: set[str] = set()
        try:
            waiting = list(self._used(source))
        except SyntaxError:  # a notebook's own commands, for instance
            return sorted(self.files)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self._used(self._sources[name])
        return sorted(found)

    def _used(self, source: str) -> Iterator[str]:
        for name in _names(source, self.name):
            yield from self._resolved(name)

    def _resolved(self, dotted: str) -> Iterator[str]:
        """The modules on the way along a dotted name, through the faces of packages."""
        at, *parts = dotted.split(".")
        yield at
        for part in parts:
            face = _face(self._sources[at])
            if part == WHOLE:
                yield from (f"{at}.{module}" for module in face.values())
            if part != WHOLE and f"{at}.{part}" in self.files:
                at = f"{at}.{part}"
            elif part in face:
                at = f"{at}.{face[part]}"
            else:
                return
            yield at


@functools.cache
def _names(source: str, package: str) -> frozenset[str]:
    """Dotted names of the package in a source: what it imports, and how far it follows attributes from there."""
    nodes = list(ast.walk(ast.parse(source)))
    bound, found = {}, set()
    for node in nodes:
        for name, local, meaning in _imported(node):
            if name.split(".")[0] == package:
                found.add(name)
                bound[local] = meaning
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        base, *attributes = _dotted(node).split(".")
        if base in bound and id(node) not in inner:
            found.add(".".join([bound[base], *attributes, WHOLE]))
    return frozenset(found)


def _dotted(node: ast.AST) -> str:
    """The name a.b.c that a node is; empty for any other node."""
    attributes = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(attributes)]) if isinstance(node, ast.Name) else ""


def _imported(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """What an import statement imports, and the name it binds to what; nothing for any other node."""
    match node:
        case ast.Import(names=aliases):
            for alias in aliases:
                top = alias.name.split(".")[0]
                yield alias.name, alias.asname or top, alias.name if alias.asname else top
        case ast.ImportFrom(module=str(module), names=aliases, level=0):
            for alias in aliases:
                name = f"{module}.{alias.name}"
                yield name, alias.asname or alias.name, name


@functools.cache
def _face(source: str) -> dict[str, str]:
    """The names that a lazy face offers, and the module behind each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _dotted(node.func) == "lazy_loader.attach":
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            behind = {name: module for module, names in given.get("submod_attrs", {}).items() for name in names}
            return behind | {module: module for module in given.get("submodules", ())}
    return {}
