"""What a model does in training that makes a sample's gradient depend on chance, or on the other samples."""

from dataclasses import dataclass

from torch import fx, nn

from spear.models.traced import Traced, operation

DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"}
DROPOUTS |= {"feature_alpha_dropout", "native_dropout"}
ENTRYWISE = {"dropout", "native_dropout"}  # those that drop entries one by one
NORMALISATIONS = {"batch_norm"}
NORMALISED_BY = 5  # the argument that says whether the batch's own statistics are used


@dataclass(frozen=True)
class Mode:
    """Dropout, or batch normalisation (`mixes`): `words` name it; `on` says that the model is in training mode."""

    words: str
    mixes: bool
    on: bool


def mode(traced: Traced, node: fx.Node) -> Mode | None:
    """What a node does in training mode; `None` where that is the same as in evaluation mode."""
    part, kind = traced.part(node), operation(node)
    if isinstance(part, nn.modules.dropout._DropoutNd) and part.p:
        return Mode(f"dropout {node.target} (p = {part.p:g})", False, part.training)
    if isinstance(part, nn.RReLU):
        return Mode(f"random slopes {node.target} (RReLU)", False, part.training) if part.lower < part.upper else None
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return Mode(f"batch normalisation {node.target}", True, part.training or part.running_mean is None)
    if node.op == "call_function" and kind in DROPOUTS:
        share, on = _dropout(node)
        return Mode(f"dropout (p = {share:g})", False, on or traced.training) if share else None
    if node.op == "call_function" and kind in NORMALISATIONS:
        on = node.kwargs.get("training", node.args[NORMALISED_BY] if len(node.args) > NORMALISED_BY else False)
        return Mode("batch normalisation", True, bool(on) or traced.training)
    return None


def _dropout(node: fx.Node) -> tuple[float, bool]:
    """The share of entries that a function drops, and whether it does so in evaluation mode too."""
    share = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    on = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
    return float(share), bool(on)


def dropped(traced: Traced, node: fx.Node) -> float:
    """The share of entries that a node drops one by one in training mode, where that is on; else 0."""
    found, part = mode(traced, node), traced.part(node)
    if found is None or found.mixes or not found.on:
        return 0.0
    if part is not None:
        return part.p if type(part) is nn.Dropout else 0.0
    return _dropout(node)[0] if operation(node) in ENTRYWISE else 0.0


def modes(traced: Traced, nodes: list[fx.Node], *, on: bool) -> list[Mode]:
    """Those of the nodes that are on, or off."""
    found = [mode(traced, node) for node in nodes]
    return [one for one in found if one is not None and one.on == on]


def words(found: list[Mode]) -> str:
    return ", ".join(one.words for one in found)
