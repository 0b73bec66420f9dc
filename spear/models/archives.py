"""Readers of the two kinds of model file: exported programs, TorchScript archives (what is safe: `spear.models.files`).

Both walk the file's graph of tensor operators and hand it, node by node, to `spear.models.rebuild`.
"""

import json
import math
import operator
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from spear.models.rebuild import Rebuilt, Stored, Unknown

# Numbers of `torch._export.serde.schema.ScalarType`, as exported programs hold them.
DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16}
DTYPES |= {7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16}
SCHEMA = 8  # major version of the exported programs that are read
PLAIN = ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools")
USUAL = ("as_none", "as_device", "as_layout", "as_memory_format")  # the model is rebuilt as torch would by default
ONE_BATCH = "a model takes one batch and gives its logits"
CONVERSIONS = {"prim::NumToTensor", "aten::Int", "prim::unchecked_cast"}
# Between what the file fixes: flags, and whether a buffer is there.
COMPARISONS = {"aten::__is__": operator.is_, "aten::__isnot__": operator.is_not, "aten::__not__": operator.not_}


def exported(path: Path) -> Rebuilt:
    """The model of an exported program, as `torch.export.save` wrote it; a damaged file raises any exception."""
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
        program = json.loads(archive.read(f"{top}/models/model.json"))
        major = program["schema_version"]["major"]
        if major != SCHEMA:
            raise ValueError(f"an exported program of schema {major}; schema {SCHEMA} is read: export it again")
        weights, names = _tensors(archive, f"{top}/data/weights/", "model_weights_config.json")
        constants, _ = _tensors(archive, f"{top}/data/constants/", "model_constants_config.json")
    return _rebuild(program["graph_module"], constants | weights, names)


def _tensors(archive: zipfile.ZipFile, folder: str, index: str) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The tensors of a folder by name, those that share their content one tensor; and which are parameters."""
    config = json.loads(archive.read(f"{folder}{index}"))["config"]
    stored = _contents(archive, folder, config)
    read: dict[str, Tensor] = {}
    for entry in config.values():
        read.setdefault(json.dumps(entry), _tensor(stored[entry["path_name"]], entry))
    tensors = {name: read[json.dumps(entry)] for name, entry in config.items()}
    return tensors, frozenset(name for name, entry in config.items() if entry["is_param"])


def _rebuild(program: dict, tensors: dict[str, Tensor], parameters: frozenset[str]) -> Rebuilt:
    graph, specs = program["graph"], program["signature"]["input_specs"]
    given = [spec["user_input"]["arg"] for spec in specs if "user_input" in spec]
    users = [arg["as_tensor"]["name"] for arg in given if "as_none" not in arg]
    results = program["signature"]["output_specs"]
    if len(users) != 1 or len(graph["outputs"]) != len(results):
        raise ValueError(f"{len(users)} inputs and {len(graph['outputs'])} outputs: {ONE_BATCH}")
    sizes = tuple(size.get("as_int") for size in graph["tensor_values"][users[0]]["sizes"])
    rebuilt = Rebuilt(tensors, parameters, sizes)
    values: dict[str, Any] = {users[0]: rebuilt.input}
    for spec in specs:
        for kind in ("parameter", "buffer", "tensor_constant"):
            if kind in spec:
                values[spec[kind]["arg"]["name"]] = Stored(spec[kind][f"{kind}_name"])
    for node in graph["nodes"]:
        values.update(_named(node["outputs"], _call(rebuilt, node, values), rebuilt))
    returned = [values[_name(o)] for o, spec in zip(graph["outputs"], results, strict=True) if "user_output" in spec]
    rebuilt.finish(returned[0] if len(returned) == 1 else returned)
    return rebuilt


def _named(outputs: list[dict], value: Any, rebuilt: Rebuilt) -> dict[str, Any]:
    """A node's outputs by name: it has one, or several, or a list of them."""
    if len(outputs) == 1 and "as_tensors" not in outputs[0]:
        return {_name(outputs[0]): value[0] if isinstance(value, tuple) else value}
    names = [_name({"as_tensor": content}) for output in outputs for content in output.get("as_tensors", [])]
    names = names or [_name(output) for output in outputs]
    return {name: rebuilt.part(value, k) for k, name in enumerate(names)}


def _call(rebuilt: Rebuilt, node: dict, values: dict[str, Any]) -> Any:
    """The value of one node of an exported graph."""
    target = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", node["target"])
    if target is None:
        return Unknown(node["target"])
    given = [(a["name"], a.get("kind", 1), _argument(a["arg"], values)) for a in node["inputs"]]
    positional = [value for _, kind, value in given if kind == 1]
    return rebuilt.call(*target.groups(), positional, {name: value for name, kind, value in given if kind != 1})


def _argument(entry: dict, values: dict[str, Any]) -> Any:
    ((kind, content),) = entry.items()
    if kind in PLAIN:
        return content
    if kind in USUAL:
        return None
    if kind == "as_scalar_type":
        return DTYPES[content]
    if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
        return [_argument({"as_tensor": c} if kind == "as_tensors" else c, values) for c in content]
    if kind == "as_sym_int":
        return _argument(content, values)
    if kind in ("as_tensor", "as_name"):
        return values[content if kind == "as_name" else content["name"]]
    return Unknown(f"an argument of kind {kind}")


def _name(output: dict) -> str:
    """What a node's output is called: a tensor, or a size."""
    ((_, content),) = output.items()
    return content.get("name", content.get("as_name"))


def _contents(archive: zipfile.ZipFile, folder: str, config: dict) -> dict[str, bytearray]:
    """The bytes of every weight by the name of their entry, which several weights may share."""
    if any(entry["use_pickle"] for entry in config.values()):
        raise ValueError("some of its weights are pickled, which could run code when they are loaded")
    return {name: bytearray(archive.read(folder + name)) for name in {e["path_name"] for e in config.values()}}


def _tensor(content: bytearray, entry: dict) -> Tensor:
    meta = entry["tensor_meta"]
    sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
    dtype = DTYPES[meta["dtype"]]
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    if math.prod(sizes) > len(flat):
        raise ValueError(f"a weight of shape {tuple(sizes)} from {len(flat)} numbers")
    return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])


def scripted(path: Path) -> Rebuilt:
    """The model of a TorchScript archive, scripted or traced, whose code the loader runs: only for files one trusts.

    A damaged file raises any exception.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but archives remain
        model = torch.jit.load(path, map_location="cpu")
    graph = model.inlined_graph
    this, *users = graph.inputs()
    if len(users) != 1 or len(list(graph.outputs())) != 1:
        raise ValueError(f"{len(users)} inputs: {ONE_BATCH}")
    tensors = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    sizes = users[0].type().sizes() if users[0].isCompleteTensor() else None
    rebuilt = Rebuilt(tensors, frozenset(dict(model.named_parameters())), tuple(sizes or ()))
    values: dict[str, Any] = {this.debugName(): Place("", model), users[0].debugName(): rebuilt.input}
    _walk(rebuilt, graph, values)
    rebuilt.finish(values[next(graph.outputs()).debugName()])
    return rebuilt


@dataclass(frozen=True)
class Place:
    """A module of a TorchScript model, and its qualified name."""

    name: str
    module: torch.jit.ScriptModule


def _walk(rebuilt: Rebuilt, block: torch._C.Graph | torch._C.Block, values: dict[str, Any]) -> None:
    """Bind the output of every node of a block; of a decision that the file itself takes, only the branch taken."""
    for node in block.nodes():
        given = [values[v.debugName()] for v in node.inputs()]
        outputs = [output.debugName() for output in node.outputs()]
        if node.kind() == "prim::If" and isinstance(given[0], bool):
            taken = list(node.blocks())[0 if given[0] else 1]
            _walk(rebuilt, taken, values)
            values.update(zip(outputs, [values[v.debugName()] for v in taken.outputs()], strict=True))
        else:
            values.update(dict.fromkeys(outputs, _value(rebuilt, node, given)))


def _value(rebuilt: Rebuilt, node: torch._C.Node, given: list[Any]) -> Any:
    """The value of one node of a TorchScript graph: a constant, an attribute, a list, or an operator's output."""
    kind = node.kind()
    if kind == "prim::Constant":
        value = node.output().toIValue()
        return rebuilt.constant(value) if isinstance(value, Tensor) else value
    if kind == "prim::GetAttr" and isinstance(given[0], Place):
        return _attribute(given[0], node.s("name"))
    if kind == "prim::ListConstruct":
        return given
    if kind in CONVERSIONS:
        return given[0]
    if kind in COMPARISONS and not any(isinstance(value, Unknown | fx.Node) for value in given):
        return COMPARISONS[kind](*given)
    schema = re.match(r"aten::(\w+)(?:\.(\w+))?\(", node.schema())
    return rebuilt.call(schema[1], schema[2] or "default", given, {}) if schema else Unknown(kind)


def _attribute(place: Place, name: str) -> Place | Stored | bool | float | int | None:
    value, qualified = getattr(place.module, name), f"{place.name}.{name}".lstrip(".")
    if isinstance(value, torch.jit.ScriptModule):
        return Place(qualified, value)
    return Stored(qualified) if isinstance(value, Tensor) else value
