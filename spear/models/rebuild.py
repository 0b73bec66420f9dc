"""A model read from a file, rebuilt from known operators as a module that `torch.fx` can trace.

Nothing that comes with a file is run: its graph names tensor operators, and only those of `ALLOWED` are rebuilt.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spear.models.linear_nodes import name_layers

RESHAPES = {"flatten": "flatten", "view": "view", "reshape": "reshape", "unflatten": "unflatten", "sym_size": "size"}
RESHAPES |= {"size": "size", "contiguous": "contiguous"}
DROPOUTS = {"dropout": F.dropout, "native_dropout": F.dropout, "dropout_": F.dropout, "alpha_dropout": F.alpha_dropout}
DROPOUTS |= {"feature_dropout": F.dropout2d}
SAME = {"alias", "clone", "detach", "detach_", "lift_fresh_copy"}
# Batch normalisation as decompositions write it: with the flag for training, or without.
DECOMPOSED = {"_native_batch_norm_legit_no_training": False, "_native_batch_norm_legit_functional": True}
MADE = {"zeros", "ones", "full"}  # of a size that the graph names
LARGEST = 2**20  # entries of what is made so
OPERATORS = """
    _convolution convolution conv1d conv2d conv3d conv_transpose2d linear matmul mm addmm bmm t transpose permute
    batch_norm instance_norm layer_norm group_norm native_layer_norm native_group_norm max_pool1d max_pool2d
    numpy_T max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d
    adaptive_avg_pool2d adaptive_max_pool2d relu gelu silu elu leaky_relu prelu sigmoid tanh softplus hardtanh hardswish
    hardsigmoid mish relu6 softmax _softmax log_softmax _log_softmax add sub rsub mul div neg exp log abs sqrt rsqrt pow
    reciprocal mean sum pad constant_pad_nd cat stack squeeze unsqueeze select slice expand movedim
    scaled_dot_product_attention embedding upsample_nearest2d clamp clamp_min clamp_max maximum minimum threshold where
    gt ge lt le eq ne zeros_like ones_like full_like scalar_tensor to _to_copy zeros ones full
"""
ALLOWED = frozenset(OPERATORS.split())
IN_PLACE = frozenset({"relu_", "add_", "sub_", "mul_", "div_", "neg_", "clamp_", "clamp_min_", "threshold_"})
OF_NUMBERS = {"int", "float", "bool", "str", "device"}  # overloads of what TorchScript does beside tensors


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
        self.tensors, self.parameters, self.sizes = dict(tensors), parameters, sizes
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

        Raises `ValueError` where an argument is itself unknown.
        """
        if name in DROPOUTS:
            source, share, training = arguments[:3]
            return self.graph.call_function(DROPOUTS[name], (self._value(source), share, bool(training)))
        if name in SAME:
            return arguments[0]
        if name in RESHAPES:
            return self._reshape(RESHAPES[name], self._values(arguments))
        if name == "__getitem__":
            return self.graph.call_function(operator.getitem, self._values(arguments))
        if name in DECOMPOSED:
            own = arguments if DECOMPOSED[name] else (*arguments[:5], False, *arguments[5:])
            return (self.graph.call_function(torch.ops.aten.batch_norm.default, (*self._values(own), False)),)
        changes = name in IN_PLACE and not isinstance(arguments[0], Stored)  # counters in buffers count on elsewhere
        if (name not in ALLOWED and not changes) or overload in OF_NUMBERS:
            return Unknown(f"aten::{name}")
        if name in MADE and math.prod(size for size in arguments[0] if isinstance(size, int)) > LARGEST:
            raise ValueError(f"makes a tensor of size {arguments[0]}")
        known = getattr(getattr(torch.ops.aten, name), overload)
        named = [a.name for a in known._schema.arguments if a.kwarg_only]
        first = len(known._schema.arguments) - len(named)  # TorchScript gives keywords by position too
        keywords = {**keywords, **dict(zip(named, self._values(arguments[first:]), strict=False))}
        return self.graph.call_function(known, self._values(arguments[:first]), keywords)

    def part(self, value: Any, index: int) -> Any:
        """One of the outputs of a node that has several."""
        if isinstance(value, tuple):
            return value[index] if index < len(value) else Unknown("a statistic of batch normalisation")
        return value if isinstance(value, Unknown) else self.graph.call_function(operator.getitem, (value, index))

    def constant(self, value: Tensor) -> Stored:
        """A tensor of the graph itself, kept as a buffer."""
        name = f"constant_{len(self.tensors)}"
        self.tensors[name] = value.detach()
        return Stored(name)

    def finish(self, output: Any) -> None:
        """Make the module, with every parameter of the file that its output depends on, and its linear layers."""
        self.graph.output(self._value(output))
        self.module = fx.GraphModule(self.root, self.graph).eval()
        self.module.graph.eliminate_dead_code()
        name_layers(self.module)

    def _reshape(self, method: str, arguments: tuple) -> fx.Node:
        source, *rest = arguments
        sizes = rest[0] if rest else None
        if method in ("view", "reshape") and self.sizes and sizes[0] == self.sizes[0]:
            if -1 in sizes[1:]:
                rest[0] = [self.graph.call_method("size", (source, 0)), *sizes[1:]]
            else:
                rest[0] = [-1, *sizes[1:]]
        return self.graph.call_method(method, (source, *rest))

    def _values(self, arguments: Sequence[Any]) -> tuple:
        return tuple(self._value(a) for a in arguments)

    def _value(self, value: Any) -> Any:
        if isinstance(value, Unknown):
            raise ValueError(f"the model uses {value.operator}, which is not rebuilt from files")
        if isinstance(value, Stored):
            return self._stored(value.name)
        return [self._value(v) for v in value] if isinstance(value, list | tuple) else value

    def _stored(self, name: str) -> fx.Node:
        name = self._first(name)
        parent, leaf = self._parent(name), name.rpartition(".")[2]
        if not hasattr(parent, leaf):
            tensor = self.tensors[name]
            if name in self.parameters:
                parent.register_parameter(leaf, nn.Parameter(tensor, tensor.is_floating_point()))
            else:
                parent.register_buffer(leaf, tensor)
        return self.graph.get_attr(name)

    def _first(self, name: str) -> str:
        """The first name of a tensor that has several."""
        return next(known for known, tensor in self.tensors.items() if tensor is self.tensors[name])

    def _parent(self, name: str) -> nn.Module:
        parent = self.root
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        return parent
