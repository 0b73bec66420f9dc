"""Random models, losses, batches and updates beyond ReLU networks: no false certificate, and no traceback.

    python tests/architectures.py --first N --count N

prints a line for each problem that went wrong, and how many were certified.
"""

import argparse
import copy
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import spear
from spear.federated import SharedUpdate, gradient

DTYPE = torch.float64
FLAT = [nn.ReLU, nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.ReLU6, nn.Hardsigmoid]
CURVED = [nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.SELU, nn.Hardswish, nn.Mish, nn.Softsign]
NORMS = [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, lambda m: nn.BatchNorm1d(m, affine=False)]
KINDS = ("chain", "chain", "chain", "mixed", "normalised", "dropout", "convolution", "block")
MERGED = {"nearly equal", "repeated", "relabelled", "collinear", "unused feature", "affine"}


class Block(nn.Module):
    """A transformer's feed-forward block, and the mean of its tokens."""

    def __init__(self, entries: int, width: int, outputs: int, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(entries, width), nn.Linear(width, entries)
        self.activation, self.head = activation, nn.Linear(entries, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(self.activation(self.first(x)))
        return self.head(torch.tanh(x).mean(1))


@dataclass(frozen=True)
class Problem:
    """What the attacker has, the truth, and whether a count that is less than the samples lies as merged ones would."""

    words: str
    model: nn.Module
    update: SharedUpdate
    x: Tensor
    y: Tensor | None
    trusted: bool


@dataclass(frozen=True)
class Verdict:
    """What became of a problem; `error` is a traceback, `wrong` a false claim."""

    words: str
    certified: int = 0
    wrong: str = ""
    error: str = ""


def model_of(r: random.Random, outputs: int) -> tuple[str, nn.Module, tuple[int, ...]]:
    kind, one = r.choice(KINDS), r.choice([*FLAT, *CURVED])
    n, width = r.randint(4, 24), r.randint(24, 60)
    if kind == "block":
        shape = r.randint(1, 4), r.randint(4, 12)
        return kind, Block(shape[1], width, outputs, one()), shape
    shape, parts = (n,), []
    if kind == "convolution":
        shape = (2, 6, 6)
        parts = [nn.Conv2d(2, r.choice([4, 8, 16]), 3, padding=1, stride=r.choice([1, 2])), one()]
        parts += [nn.MaxPool2d(2)] * (r.random() < 0.3) + [nn.Flatten()]
        n = nn.Sequential(*parts)(torch.zeros(1, *shape)).shape[1]
    for _ in range(r.randint(1, 3)):
        parts.append(nn.Linear(n, width, bias=r.random() > 0.1))
        parts += [r.choice(NORMS)(width)] * (kind == "normalised" and r.random() < 0.7)
        parts.append((r.choice([*FLAT, *CURVED]) if kind == "mixed" else one)())
        parts += [nn.Dropout(r.choice([0.1, 0.3, 0.5]))] * (kind == "dropout" and r.random() < 0.7)
        n = width
    model = nn.Sequential(*parts, nn.Linear(n, outputs))
    if r.random() < 0.3:  # what leaves open how long inputs are
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(not name.endswith("bias") or r.random() < 0.3)
            model[-1].weight *= 10 ** r.choice([0, 1, -3, -6, -10])
    return kind, model, shape


def batch_of(r: random.Random, x: Tensor, y: Tensor, normal: Callable[..., Tensor]) -> str:
    """Changes a batch in place by one trick; its name."""
    size, classes = 10 ** r.uniform(-10, 0), int(y.max()) + 1
    tricks = {
        "nearly equal": lambda: (x[-1].copy_(x[0] + size * normal(*x[0].shape)), y[-1].copy_(y[0])),
        "repeated": lambda: (x[-1].copy_(x[0]), y[-1].copy_(y[0])),
        "relabelled": lambda: (x[-1].copy_(x[0]), y[-1].copy_((y[0] + 1) % max(classes, 2))),
        "mirrored": lambda: x[-1].copy_(-x[0]),
        "collinear": lambda: x.copy_(x[:1] * (1 + torch.rand(len(x), *[1] * (x.ndim - 1), dtype=DTYPE))),
        "affine": lambda: x[-1].copy_(2 * x[0] - x[len(x) // 2]),
        "black": lambda: x[-1].zero_(),
        "faint": lambda: x[-1].mul_(size),
        "unused feature": lambda: (x[-1].copy_(x[0]), x[-1].flatten()[-1].add_(size), y[-1].copy_(y[0])),
    }
    name = r.choice(["plain", "plain", *tricks])
    if name == "plain" or len(x) < 2:
        return "plain"
    tricks[name]()
    return name


def loss_of(r: random.Random, z: Tensor, y: Tensor, told: str, normal: Callable[..., Tensor]) -> tuple[str, Tensor]:
    """A loss that is not the one that was told."""
    t, outputs = normal(*z.shape), z.shape[1]
    losses = {
        "numbers": lambda: F.mse_loss(z, t),
        "several labels": lambda: F.binary_cross_entropy_with_logits(z, (t > 0).to(z)),
        "anything": lambda: (z * t).mean(),
        "one sample without": lambda: (z[1:] * t[1:]).mean() if len(z) > 1 else (z * t).mean(),
        "of rank one": lambda: (z * t[:, :1] * t[:1]).mean(),
        "negative": lambda: -F.mse_loss(z, t),
    }
    if outputs > 1:
        losses |= {
            "soft labels": lambda: F.cross_entropy(z, t.softmax(1)),
            "margin": lambda: F.multi_margin_loss(z, y % outputs),
        }
    name = r.choice([*losses])
    return name, losses[name]()


def changed(
    r: random.Random, model: nn.Module, gradients: dict[str, Tensor], normal: Callable[..., Tensor]
) -> tuple[str, nn.Module, dict[str, Tensor]]:
    """The model that the server has, and the tensors that reach it."""
    size, norm = 10 ** r.uniform(-12, 0), math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    step = max(size * norm / 100, 1e-300)
    factor, one = 10 ** r.uniform(-4, 3), r.choice([*gradients])
    ways = {
        "factor": lambda _, g: factor * g,
        "factors": lambda _, g: 10 ** r.uniform(-2, 2) * g,
        "biases scaled": lambda k, g: g * (2 if k.endswith("bias") else 1),
        "weights scaled": lambda k, g: g * (1 if k.endswith("bias") else 0.5),
        "one bias scaled": lambda k, g: g * (1 + size * (k == one)),
        "float32": lambda _, g: g.float(),
        "noise": lambda _, g: g + size * g.abs().max() * normal(*g.shape),
        "rounded": lambda _, g: (g / step).round() * step,
        "dropped": lambda _, g: g * (torch.rand(g.shape) > 0.1),
    }
    name = r.choice([*["plain"] * 8, *ways, "wrong weights"])
    if name == "wrong weights":
        model = copy.deepcopy(model)
        with torch.no_grad():
            for p in model.parameters():
                p += size * p * normal(*p.shape)
    way = ways.get(name, lambda _, g: g)
    return name, model, {k: way(k, g) for k, g in gradients.items()}


def build(seed: int) -> Problem:
    r, g = random.Random(seed), Generator().manual_seed(seed)
    torch.manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=DTYPE)  # noqa: E731
    outputs, b = r.choice([1, 2, 3, 5, 10]), r.randint(1, 5)
    kind, model, shape = model_of(r, outputs)
    model = model.to(DTYPE).train(b > 1 and r.random() < 0.7)
    x, y = normal(b, *shape), torch.randint(max(outputs, 2), (b,), generator=g)
    told = r.choice(["cross_entropy"] * 3 + ["squared_error", "binary_cross_entropy"])
    told = "binary_cross_entropy" if outputs == 1 and told == "cross_entropy" else told
    trick = batch_of(r, x, y, normal)
    if trick == "unused feature":
        with torch.no_grad():
            next(p for p in model.modules() if isinstance(p, nn.Linear)).weight[:, -1] = 0
    update, loss = gradient(model, x, y, loss=told), "as told"
    if r.random() < 0.5:
        loss, value = loss_of(r, model(x), y, told, normal)
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
        update = replace(update, gradients=dict(zip(names, found, strict=True)), buffers=None)
    way, server, tensors = changed(r, model, dict(update.gradients), normal)
    count = r.choice([b, b, b, b, None, max(b - 1, 1), b + 1, 2 * b])
    trusted = count is None or count >= b or trick not in MERGED
    words = f"{seed}: {kind} {type(model).__name__}, {trick}, {loss} ({told}), {way}, {count} of {b}"
    update = replace(update, gradients=tensors, count=count)
    return Problem(words, server, update, x, y if loss == "as told" else None, trusted)


def judge(seed: int) -> Verdict:
    """Attack a problem with a small budget, and hold what is certified against the truth."""
    problem = build(seed)
    method = "block" if "block" in problem.words and seed % 2 else ("auto", "network")[seed % 3 == 0]
    try:
        result = spear.attack(problem.model, problem.update, method=method, max_proposals=64, time_limit=4, seed=0)
    except ValueError:
        return Verdict(problem.words)
    except Exception:
        return Verdict(problem.words, error=traceback.format_exc())
    certified = int(result.certified.sum())
    if not problem.trusted or not certified:
        return Verdict(problem.words, certified)
    return Verdict(problem.words, certified, wrong(problem, result))


def wrong(problem: Problem, result: spear.Reconstruction) -> str:
    """What is false of what a result claims."""
    truth = _entering(problem, result.features_of)
    truth = truth.reshape(-1, *result.inputs.shape[1:]) if result.inputs.ndim < truth.ndim else truth  # its tokens
    own = result.labels is not None and problem.y is not None and truth is problem.x
    report = spear.metrics.evaluate(result, truth)
    error = torch.full((len(result.certified),), math.inf, dtype=DTYPE)
    there = report.match >= 0
    error[report.match[there]] = report.relative_error[there]
    sure = result.certified
    if bool((error > result.error_bound)[sure].any()):
        return f"an error of {float(error[sure].max()):.1e}, certified: {result.reason}"
    if own and bool((result.labels[report.match[there]] != problem.y[there])[sure[report.match[there]]].any()):
        return f"a label: {result.reason}"
    return ""


def _entering(problem: Problem, layer: str) -> Tensor:
    """The samples, or what enters the layer."""
    if not layer:
        return problem.x
    seen: list[Tensor] = []
    hook = problem.model.get_submodule(layer).register_forward_hook(
        lambda _m, given, _o: seen.append(given[0].detach())
    )
    problem.model(problem.x)
    hook.remove()
    return seen[0].flatten(0, -2) if isinstance(problem.model, Block) else seen[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    for seed in range(options.first, options.first + options.count):
        verdict = judge(seed)
        seen |= {"problems": 0}
        seen.update(problems=1, certified=verdict.certified, wrong=bool(verdict.wrong), tracebacks=bool(verdict.error))
        if verdict.wrong or verdict.error:
            print(verdict.words, verdict.wrong, verdict.error[-600:], sep="\n", flush=True)
    print(dict(seen))


if __name__ == "__main__":
    main()
