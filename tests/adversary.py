"""Hypothesis as the adversary: batches, models and updates made to be certified although they are wrong.

    python tests/adversary.py --count N [--results FILE]

Each problem mixes one trick on the batch, the network, the loss, the update and the disclosed count, at random, and is
attacked by one method. Results are appended to a file, so that a run which was stopped goes on where it ended. The
table has one row for each trick: problems, certified samples, false ones, the largest true error over its bound.
"""

import argparse
import copy
import json
import math
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spear
from spear import models
from spear.federated import SharedUpdate, gradient
from spear.federated.clients import local_training

METHODS = ("network", "layer", "dictionary", "guided", "sampling", "auto")
BLOCK = 100  # problems drawn from one seed
DTYPE = torch.float64


@dataclass(frozen=True)
class Recipe:
    """What Hypothesis draws: sizes, one trick of each kind, how strong it is, and the seed of everything else."""

    method: str
    samples: int
    inputs: int
    width: int
    depth: int
    classes: int
    batch: str
    network: str
    loss: str
    update: str
    count: str
    exponent: float
    seed: int

    @property
    def tricks(self) -> tuple[str, ...]:
        parts = (self.batch, self.network, self.loss, self.update, self.count)
        return tuple(part for part in parts if part != "plain") or ("honest",)

    @property
    def size(self) -> float:
        return 10**self.exponent


@dataclass
class Draft:
    """A problem in the making: `weights` (b,) are the samples' in the loss, `wanted` (b, classes) their labels."""

    recipe: Recipe
    generator: torch.Generator
    model: nn.Sequential
    x: Tensor
    y: Tensor
    wanted: Tensor | None = None
    weights: Tensor | None = None
    reduction: str = "mean"

    @property
    def layers(self) -> list[nn.Linear]:
        return [part for part in self.model if isinstance(part, nn.Linear)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=DTYPE)

    def masks(self, x: Tensor) -> Tensor:
        """Which hidden units one input activates, all layers side by side."""
        found = []
        for part in self.model:
            x = part(x[None])[0] if isinstance(part, nn.Flatten) else part(x)
            found += [x > 0] if isinstance(part, nn.Linear) and part is not self.layers[-1] else []
        return torch.cat(found)


def unused(d: Draft) -> None:
    d.layers[0].weight[:, -1] = 0
    d.x[-1], d.y[-1] = d.x[0], d.y[0]
    d.x[-1, -1] += d.recipe.size


def unused_relabelled(d: Draft) -> None:
    unused(d)
    d.y[-1] = (d.y[0] + 1) % max(d.recipe.classes, 2)


def twins(d: Draft) -> None:
    """Every sample has a twin that differs where no weight looks."""
    half = (len(d.x) + 1) // 2
    d.layers[0].weight[:, -1] = 0
    d.x, d.y = d.x[:half].repeat(2, 1), d.y[:half].repeat(2)
    d.x[half:, -1] += d.recipe.size


def null_space(d: Draft) -> None:
    """x + h and x - h with one label and one activation pattern, h in the kernel of the logits' Jacobian."""
    jacobian = torch.autograd.functional.jacobian(lambda v: d.model(v[None])[0], d.x[0])
    kernel = torch.linalg.svd(jacobian)[2][len(jacobian) :]
    if not len(kernel):
        return
    h, x = kernel.T @ d.normal(len(kernel)), d.x[0].clone()
    while not torch.equal(d.masks(x + h), d.masks(x - h)):
        h /= 2
    d.x[0], d.x[-1], d.y[-1] = x + h, x - h, d.y[0]


def near(d: Draft) -> None:
    d.x[-1], d.y[-1] = d.x[0] + d.recipe.size * d.normal(d.x.shape[1]), d.y[0]


def repeated(d: Draft) -> None:
    d.x[-1], d.y[-1] = d.x[0], d.y[0]


def relabelled(d: Draft) -> None:
    d.x[-1], d.y[-1] = d.x[0], (d.y[0] + 1) % max(d.recipe.classes, 2)


def collinear(d: Draft) -> None:
    d.x = d.x[0] * (1 + torch.rand(len(d.x), 1, generator=d.generator, dtype=DTYPE))


def constant(d: Draft) -> None:
    d.x = d.normal(len(d.x), 1).expand(-1, d.x.shape[1]).clone()


def affine(d: Draft) -> None:
    d.x[-1] = 2 * d.x[0] - d.x[len(d.x) // 2]


def total(d: Draft) -> None:
    d.x[-1] = d.x[:-1].sum(0)


def black(d: Draft) -> None:
    d.x[-1] = 0


def faint(d: Draft) -> None:
    d.x[-1] *= d.recipe.size


def large_biases(d: Draft) -> None:
    """One linear region holds every sample."""
    for layer in d.layers[:-1]:
        layer.bias += 30


def huge_column(d: Draft) -> None:
    d.layers[0].weight[:, 0] = 1e3 * d.layers[0].weight[:, 0].sign()
    d.x[:, 0] = 1


def dead(d: Draft) -> None:
    d.layers[0].bias[: int(0.8 * d.recipe.width)] = -1e3


def nearly_all_dead(d: Draft) -> None:
    d.layers[0].bias[: d.recipe.width - 2] = -1e3


def huge_units(d: Draft) -> None:
    d.layers[0].weight[:3] *= 1e5


def twin_units(d: Draft) -> None:
    half = d.recipe.width // 2
    d.layers[0].weight[half : 2 * half] = d.layers[0].weight[:half].clone()
    d.layers[0].bias[half : 2 * half] = d.layers[0].bias[:half].clone()


def integers(d: Draft) -> None:
    d.layers[0].weight.copy_(torch.randint(-1, 2, d.layers[0].weight.shape, generator=d.generator))
    d.x = (d.x > 0).to(DTYPE)


def sure(d: Draft) -> None:
    d.layers[-1].weight *= 30
    d.y = d.model(d.x).argmax(1) if d.recipe.classes > 1 else (d.model(d.x)[:, 0] > 0).long()


def sure_and_wrong(d: Draft) -> None:
    d.layers[-1].weight *= 30
    d.y = d.model(d.x).argmin(1) if d.recipe.classes > 1 else (d.model(d.x)[:, 0] < 0).long()


def output_bias(d: Draft) -> None:
    d.layers[-1].bias += 1e3


def smoothing(d: Draft) -> None:
    share = 0.1 + 0.8 * torch.rand(1, generator=d.generator, dtype=DTYPE)
    d.wanted = (1 - share) * d.wanted + share / d.wanted.shape[1]


def halves(d: Draft) -> None:
    d.wanted = (d.wanted + d.wanted.roll(1, 1)) / 2


def class_weights(d: Draft) -> None:
    d.weights = 1 / (1 + d.y.to(DTYPE))
    d.weights /= d.weights.sum()


def ignored(d: Draft) -> None:
    d.weights = torch.zeros(len(d.x), dtype=DTYPE)
    d.weights[0] = 1


def uneven_clients(d: Draft) -> None:
    """One client has the first sample alone, another all others; their means are averaged."""
    d.weights = torch.full((len(d.x),), 0.5 / max(len(d.x) - 1, 1), dtype=DTYPE)
    d.weights[0] = 0.5


BATCHES: dict[str, Callable[[Draft], None]] = {
    "unused feature": unused,
    "unused feature, other label": unused_relabelled,
    "every sample a twin": twins,
    "kernel of the logits": null_space,
    "nearly equal": near,
    "repeated": repeated,
    "repeated, other label": relabelled,
    "collinear": collinear,
    "constant": constant,
    "affine combination": affine,
    "sum of the others": total,
    "black": black,
    "faint": faint,
}
NETWORKS = {
    "large biases": large_biases,
    "huge column": huge_column,
    "dead units": dead,
    "two live units": nearly_all_dead,
    "huge units": huge_units,
    "twin units": twin_units,
    "integer weights": integers,
    "sure head": sure,
    "sure and wrong head": sure_and_wrong,
    "output bias": output_bias,
}
LOSSES = {
    "label smoothing": smoothing,
    "two labels each": halves,
    "class weights": class_weights,
    "labels ignored": ignored,
    "uneven clients": uneven_clients,
}
UPDATES = (
    "sum for a mean",
    "factor",
    "bias gradient scaled",
    "head kept private",
    "private, bias gradient scaled",
    "tiny learning rate",
    "global clipping",
    "sample clipping",
    "float32",
    "float32 stored as float64",
    "rounded",
    "noise",
    "entries dropped",
    "wrong weights",
    "another batch's tensor",
    "local steps",
)
COUNTS = ("hidden", "one less", "one more", "rank", "twice")
COPIES = {
    "unused feature",
    "unused feature, other label",
    "every sample a twin",
    "kernel of the logits",
    "nearly equal",
}
COPIES |= {"repeated", "repeated, other label", "collinear", "constant"}

plain = st.just("plain")


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Hostile problems, small enough for some tens of milliseconds each."""
    return Recipe(
        method=draw(st.sampled_from(METHODS)),
        samples=draw(st.integers(1, 6)),
        inputs=draw(st.integers(3, 30)),
        width=draw(st.integers(24, 60)),
        depth=draw(st.integers(2, 4)),
        classes=draw(st.sampled_from([1, 2, 2, 3, 5, 10, 40])),
        batch=draw(st.one_of(plain, st.sampled_from(sorted(BATCHES)))),
        network=draw(st.one_of(plain, plain, st.sampled_from(sorted(NETWORKS)))),
        loss=draw(st.one_of(plain, plain, st.sampled_from(["squared_error", "binary_cross_entropy", *sorted(LOSSES)]))),
        update=draw(st.one_of(plain, plain, st.sampled_from(UPDATES))),
        count=draw(st.one_of(plain, plain, st.sampled_from(COUNTS))),
        exponent=draw(st.floats(-12, 0.5)),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass(frozen=True)
class Problem:
    """What the attacker has, and the truth."""

    model: nn.Module
    update: SharedUpdate
    x: Tensor
    y: Tensor
    trusted: bool


def build(recipe: Recipe) -> Problem:
    """The problem of a recipe. One whose disclosed count lies as merged samples would have it is not `trusted`."""
    g = torch.Generator().manual_seed(recipe.seed)
    x = torch.randn(recipe.samples, recipe.inputs, generator=g, dtype=DTYPE)
    y = torch.randint(max(recipe.classes, 2), (recipe.samples,), generator=g)
    model = models.fcnn((recipe.inputs,), recipe.width, recipe.depth, recipe.classes, seed=recipe.seed % 1000)
    d = Draft(recipe, g, model, x, y)
    with torch.no_grad():
        NETWORKS.get(recipe.network, lambda d: None)(d)
        if recipe.batch != "plain" and recipe.samples > 1:
            BATCHES[recipe.batch](d)
    update = sent(d)
    return disclosed(d, *changed(d, update))


def sent(d: Draft) -> SharedUpdate:
    """The gradient of the loss that the recipe names."""
    name, classes = d.recipe.loss, d.recipe.classes
    loss = name if name in ("squared_error", "binary_cross_entropy") else "cross_entropy"
    if classes == 1 and loss == "cross_entropy":
        loss = "binary_cross_entropy"
    if loss != "cross_entropy" or name == "plain":
        return gradient(d.model, d.x, d.y, loss=loss)
    d.wanted = F.one_hot(d.y, classes).to(DTYPE)
    d.weights = torch.full((len(d.x),), 1 / len(d.x), dtype=DTYPE)
    LOSSES[name](d)
    return SharedUpdate(weighted(d), count=len(d.x))


def weighted(d: Draft) -> dict[str, Tensor]:
    losses = F.cross_entropy(d.model(d.x), d.wanted, reduction="none")
    names, parameters = zip(*d.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((d.weights * losses).sum(), parameters), strict=True))


def mapped(update: SharedUpdate, change: Callable[[str, Tensor], Tensor]) -> SharedUpdate:
    return replace(update, gradients={name: change(name, value) for name, value in update.gradients.items()})


def changed(d: Draft, update: SharedUpdate) -> tuple[nn.Module, SharedUpdate]:
    """The model that the server has, and the update that reaches it."""
    size, name, g = d.recipe.size, d.recipe.update, d.generator
    first = lambda u: replace(u, gradients={k: v for k, v in u.gradients.items() if k.startswith("fc1")})  # noqa: E731
    off = lambda k, v: v * (1 + size) if k == "fc1.bias" else v  # noqa: E731
    norm = math.sqrt(sum(float(v.pow(2).sum()) for v in update.gradients.values()))
    if name in ("sum for a mean", "factor"):
        factor = len(d.x) if name == "sum for a mean" else float(1 + 9 * torch.rand(1, generator=g))
        return d.model, mapped(update, lambda _, v: factor * v)
    if name == "bias gradient scaled":
        return d.model, mapped(update, off)
    if name == "head kept private":
        return d.model[:3], first(update)
    if name == "private, bias gradient scaled":
        return d.model[:3], first(mapped(update, off))
    if name == "tiny learning rate":
        rate = size**0.8
        after = {k: p.detach() - rate * update.gradients[k] for k, p in d.model.named_parameters()}
        change = {k: p.detach() - after[k] for k, p in d.model.named_parameters()}
        return d.model, replace(update, gradients=change, learning_rate=rate)
    if name == "global clipping":
        return d.model, mapped(update, lambda _, v: v * min(1.0, 0.1 / norm))
    if name == "sample clipping":
        return d.model, clipped(d, update)
    if name == "float32":
        return d.model, mapped(update, lambda _, v: v.float())
    if name == "float32 stored as float64":
        return d.model, mapped(update, lambda _, v: v.float().double())
    if name == "rounded":
        step = size * norm / 100
        return d.model, mapped(update, lambda _, v: (v / step).round() * step)
    if name == "noise":
        return d.model, mapped(update, lambda _, v: v + size * v.abs().max() * d.normal(*v.shape))
    if name == "entries dropped":
        return d.model, mapped(update, lambda _, v: v * (torch.rand(v.shape, generator=g) > 0.1))
    if name == "wrong weights":
        server = copy.deepcopy(d.model)
        with torch.no_grad():
            for p in server.parameters():
                p += size * p * torch.randn(p.shape, generator=g, dtype=DTYPE)
        return server, update
    if name == "another batch's tensor":
        other = gradient(d.model, d.normal(*d.x.shape), d.y, loss=update.loss).gradients
        return d.model, mapped(update, lambda k, v: other[k] if k == "fc2.weight" else v)
    return d.model, update


def clipped(d: Draft, update: SharedUpdate) -> SharedUpdate:
    """Per-sample clipping at the median norm, disclosed, without noise."""
    own = [gradient(d.model, d.x[i : i + 1], d.y[i : i + 1], loss=update.loss).gradients for i in range(len(d.x))]
    norms = torch.tensor([math.sqrt(sum(float(v.pow(2).sum()) for v in one.values())) for one in own])
    clip = max(float(norms.median()), 1e-30)  # where gradients vanish
    factors = (clip / norms.clamp_min(1e-300)).clamp_max(1).tolist()
    mean = {k: sum(f * one[k] for f, one in zip(factors, own, strict=True)) / len(own) for k in own[0]}
    return SharedUpdate(mean, count=len(d.x), loss=update.loss, clip=clip)


def disclosed(d: Draft, server: nn.Module, update: SharedUpdate) -> Problem:
    """The count that is told. Where samples merge, a count that says so is the one lie that nothing can contradict."""
    true, rule = len(d.x), d.recipe.count
    if d.recipe.update == "local steps" and true > 1 and d.recipe.loss == "plain" and d.recipe.classes > 1:
        update = local_training(d.model, d.x, d.y, mini_batch=(true + 1) // 2, learning_rate=0.1)
    rank = int(torch.linalg.matrix_rank(update.gradients["fc1.weight"].double().nan_to_num(), rtol=1e-12))
    told = {"hidden": None, "one less": true - 1, "one more": true + 1, "rank": rank, "twice": 2 * true}.get(rule, true)
    told = told if told is None else max(told, 1)  # fewer is no count: `SharedUpdate` refuses it
    merged = d.recipe.batch in COPIES or d.recipe.network in ("large biases", "huge column", "integer weights")
    trusted = told is None or told == true or not (merged and told < true)
    return Problem(server, replace(update, count=told), d.x, d.y, trusted)


@dataclass(frozen=True)
class Verdict:
    """What became of one problem; `ratio` is the largest true error of a certified sample over its bound."""

    recipe: Recipe
    returned: int = 0
    recovered: int = 0
    certified: int = 0
    false: int = 0
    ratio: float = 0.0
    worst: float = 0.0
    reason: str = ""
    error: str = ""


def judge(recipe: Recipe) -> Verdict:
    """Attack the problem with a small budget, and hold what is certified against the truth."""
    problem = build(recipe)
    proposals = 64 if recipe.method in ("network", "layer", "dictionary", "auto") else 2000
    try:
        result = spear.attack(
            problem.model, problem.update, method=recipe.method, max_proposals=proposals, time_limit=2, seed=0
        )
    except ValueError as refusal:
        return Verdict(recipe, reason=f"refused: {refusal}")
    except Exception:
        return Verdict(recipe, error=traceback.format_exc().strip().splitlines()[-1])
    return compared(recipe, problem, result)


def compared(recipe: Recipe, problem: Problem, result: spear.Reconstruction) -> Verdict:
    report = spear.metrics.evaluate(result, problem.x, problem.y)
    sure, limit = result.certified, getattr(result, "limit", 1e-6)
    error = torch.full((len(sure),), math.inf, dtype=DTYPE)
    error[report.match[report.match >= 0]] = report.relative_error[report.match >= 0]
    wrong = error > limit
    if result.labels is not None:
        label = torch.full((len(sure),), -1)
        label[report.match[report.match >= 0]] = problem.y[report.match >= 0]
        wrong |= label != result.labels
    if not problem.trusted:
        return Verdict(recipe, len(sure), int(report.recovered.sum()), reason=f"not judged: {result.reason}")
    bound = getattr(result, "error_bound", None)
    bound = torch.full_like(error, math.inf) if bound is None else bound
    ratio = float((error / bound)[sure].max()) if sure.any() else 0.0
    worst = float(error[sure].max()) if sure.any() else 0.0
    counts = len(sure), int(report.recovered.sum()), int(sure.sum()), int((wrong & sure).sum())
    return Verdict(recipe, *counts, ratio, worst, result.reason)


def block(number: int) -> list[Verdict]:
    """The problems of one seed of Hypothesis."""
    found = []

    @seed(number)
    @settings(
        max_examples=BLOCK,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes())
    def collect(recipe: Recipe) -> None:
        found.append(judge(recipe))

    collect()
    return found


def table(verdicts: list[dict]) -> str:
    """One row a trick."""
    rows = defaultdict(list)
    for verdict in verdicts:
        for trick in (*Recipe(**verdict["recipe"]).tricks, f"method {verdict['recipe']['method']}", "all"):
            rows[trick].append(verdict)
    head = ("trick", "problems", "returned", "certified", "false", "error / bound", "tracebacks")
    lines = [("{:32}" + "{:>14}" * 6).format(*head)]
    for trick, found in sorted(rows.items(), key=lambda row: (row[0] == "all", row[0])):
        sums = [sum(v[key] for v in found) for key in ("returned", "certified", "false")]
        last = f"{max(v['ratio'] for v in found):.2g}", sum(bool(v["error"]) for v in found)
        lines.append(("{:32}" + "{:>14}" * 6).format(trick, len(found), *sums, *last))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--results", type=Path, default=Path("build/adversary.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    blocks = [json.loads(line) for line in options.results.open()] if options.results.exists() else []
    with options.results.open("a") as file:
        while BLOCK * len(blocks) < options.count:
            blocks.append([asdict(verdict) for verdict in block(len(blocks))])
            file.write(json.dumps(blocks[-1]) + "\n")
            file.flush()
    print(table([verdict for found in blocks for verdict in found]))


if __name__ == "__main__":
    main()
