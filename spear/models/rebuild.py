"""A model read from a file, rebuilt from known operators as a module that `torch.fx` can trace.

Nothing that comes with a file is run: its graph names tensor operators, and only those of `ALLOWED` are rebuilt.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

RESHAPES = {"flatten": "flatten", "view": "view", "reshape": "reshape", "unflatten": "unflatten", "sym_size": "size"}
RESHAPES |= {"size": "size", "contiguous": "contiguous"}
RELUS = {"relu", "relu_"}
DROPOUTS = {"dropout", "dropout_", "feature_dropout", "alpha_dropout"}
SAME = {"alias", "clone", "detach"}
TRAINING = {"batch_norm": 5, "instance_norm": 5}  # which argument says that the batch's own statistics are used
OPERATORS = """
    _convolution conv1d conv2d conv3d conv_transpose2d linear matmul mm addmm bmm t transpose permute
    batch_norm instance_norm layer_norm group_norm native_layer_norm max_pool1d max_pool2d avg_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d gelu silu elu leaky_relu prelu sigmoid tanh softplus hardtanh hardswish
    hardsigmoid mish relu6 softmax log_softmax add sub mul div neg exp mean sum pad constant_pad_nd cat stack squeeze
    unsqueeze select slice expand scaled_dot_product_attention embedding upsample_nearest2d
"""
ALLOWED = frozenset(OPERATORS.split())


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer of the file, by its qualified name."""

    name: str


@dataclass(frozen=True)
class Unknown:
    """The output of an operator that is not rebuilt: an error where the model's output needs it."""

    operator: str


class Rebuilt:
    """A model under construction, node by node. Its file's parameters and buffers are `tensors`, by qualified name.

    `sizes` is the shape of the batch that the file was recorded with, None for a size that it leaves open: a reshape to
    that batch size becomes one to any. `input` is the graph's input, `module` the model once it is finished.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], parameters: frozenset[str], sizes: tuple[int | None, ...]
    ) -> None:
        self.tensors, self.parameters, self.sizes = tensors, parameters, sizes
        self.root, self.graph = nn.Module(), fx.Graph()
        self.input = self.graph.placeholder("x")
        self.module: fx.GraphModule

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample, where the file says it."""
        shape = self.sizes[1:]
        return tuple(n for n in shape if n is not None) if shape and None not in shape else None

    def call(self, name: str, overload: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """The node of operator aten::NAME.OVERLOAD; `Unknown` for one that is not allowed.

        Raises `ValueError` for a model in training mode, and where an argument is itself unknown.
        """
        if name in RELUS:
            return self.graph.call_function(torch.relu, self._values(arguments[:1]))
        if name in DROPOUTS:
            return self._evaluated(name, arguments[2], arguments[0])
        if name in SAME:
            return arguments[0]
        if name == "linear" and isinstance(arguments[1], Stored) and arguments[1].name.endswith(".weight"):
            return self._linear(*arguments)
        if name in RESHAPES:
            return self._reshape(RESHAPES[name], self._values(arguments))
        if name == "__getitem__":
            return self.graph.call_function(operator.getitem, self._values(arguments))
        if name in TRAINING:
            self._evaluated(name, arguments[TRAINING[name]], None)
        if name not in ALLOWED:
            return Unknown(f"aten::{name}")
        known = getattr(getattr(torch.ops.aten, name), overload)
        named = [a.name for a in known._schema.arguments if a.kwarg_only]
        first = len(known._schema.arguments) - len(named)  # TorchScript gives keywords by position too
        keywords = {**keywords, **dict(zip(named, self._values(arguments[first:]), strict=False))}
        return self.graph.call_function(known, self._values(arguments[:first]), keywords)

    def finish(self, output: Any) -> None:
        """Make the module, in evaluation mode, with every parameter of the file that its output depends on."""
        self.graph.output(self._value(output))
        self.module = fx.GraphModule(self.root, self.graph).eval()
        self.module.graph.eliminate_dead_code()
        self.module.recompile()

    def _linear(self, source: Any, weight: Stored, bias: Stored | None = None) -> fx.Node:
        name = weight.name.removesuffix(".weight")
        W = self.tensors[weight.name]
        linear = nn.Linear(W.shape[1], W.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(W)
        if bias is not None:
            linear.bias = nn.Parameter(self.tensors[bias.name])
        self._parent(name).add_module(name.rpartition(".")[2], linear)
        return self.graph.call_module(name, (self._value(source),))

    def _reshape(self, method: str, arguments: tuple) -> fx.Node:
        source, *rest = arguments
        sizes = rest[0] if rest else None
        if method in ("view", "reshape") and self.sizes and sizes[0] == self.sizes[0]:
            if -1 in sizes[1:]:
                rest[0] = [self.graph.call_method("size", (source, 0)), *sizes[1:]]
            else:
                rest[0] = [-1, *sizes[1:]]
        return self.graph.call_method(method, (source, *rest))

    def _evaluated(self, name: str, training: Any, value: Any) -> Any:
        if training is not False:
            raise ValueError(f"{name} is in training mode: call model.eval() before saving the model")
        return value

    def _values(self, arguments: Sequence[Any]) -> tuple:
        return tuple(self._value(a) for a in arguments)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Unknown):
            raise ValueError(f"the model uses {value.operator}, which is not rebuilt from files")
        if isinstance(value, Stored):
            return self._stored(value.name)
        return [self._value(v) for v in value] if isinstance(value, list | tuple) else value

    def _stored(self, name: str) -> fx.Node:
        parent, leaf = self._parent(name), name.rpartition(".")[2]
        if not hasattr(parent, leaf):
            tensor = self.tensors[name]
            if name in self.parameters:
                parent.register_parameter(leaf, nn.Parameter(tensor, tensor.is_floating_point()))
            else:
                parent.register_buffer(leaf, tensor)
        return self.graph.get_attr(name)

    def _parent(self, name: str) -> nn.Module:
        parent = self.root
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        return parent
