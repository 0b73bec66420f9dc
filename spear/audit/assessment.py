"""What one's own model gives away: which layers leak, from how large a batch, and which defence stops it.

Without an update the client is simulated on a sample batch. With one, that update is attacked, and where the whole
batch comes back the defences are tried on that very batch.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from spear import inversion
from spear.audit import leaks, protection, side_by_side, simulation
from spear.audit.protection import Tested
from spear.audit.sample import Sample, choose, input_shape, outputs
from spear.audit.simulation import Comparison, Options, Reach
from spear.federated.clients import gradient
from spear.federated.naming import check_there, unwrapped
from spear.federated.update import SharedUpdate, check_told
from spear.models import tracing
from spear.models.fronts import cut
from spear.models.layers import Layer
from spear.models.memory import remembered
from spear.published import theory
from spear.reconstruction import Reconstruction, check_number

LARGEST = 2**28  # entries of all samples that simulated clients hold together
COUNT = 16  # samples of a simulated client, unless told


@dataclass(frozen=True, kw_only=True)
class Risk:
    """What a linear layer gives away of a batch. `inputs` n, `width` m; `from_data`: it reads the data itself.

    `limit` is the largest batch that its gradient can hold (rank below m, at most n), 0 where no ReLU follows, or where
    training leaves an `obstacle`. `jointly` says what it gives away together with all other layers, where it
    gives nothing by itself; `limit` is then the whole network's.
    `sampling` is the largest batch for which SPEAR expects at most `inversion.AFFORDABLE` proposals. `rows` is the
    number of tokens of a sample that enter it.
    """

    name: str
    inputs: int
    width: int
    bias: bool
    relu: bool
    from_data: bool
    obstacle: str
    limit: int
    sampling: int
    jointly: str = ""
    rows: int = 1

    @property
    def gives_away(self) -> str:
        """In words, what the layer's gradient gives away."""
        if self.jointly:
            return self.jointly
        if not self.relu:
            return "not attacked by itself: no ReLU follows"
        if self.obstacle:
            return f"not attacked by itself: {self.obstacle}"
        what = "the samples themselves" if self.from_data else "the features that enter it"
        return what if self.bias else f"{what}, each up to a factor (no bias)"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The whole report.

    `source` says where the attacked update came from and `sample` what simulated clients hold; `layer` is the layer
    whose inputs came back (None: the data), `not_attacked` what else of the model no attack here read, and why; `count`
    is the batch size of the simulations. `statistics` says what batch normalisation's buffers give away beside the
    gradients, where clients send them. `result` is what came back, `outcome` its comparison with the truth where that
    is known (simulations). `picture` is the shape of one sample as a picture. `time_limit` and `trial_limit` are the
    seconds that the attack and each simulated one had, `seconds` is what the audit took, `memory` the largest that one
    of its processes has been until then, in bytes.
    """

    model: str
    parameters: int
    source: str
    sample: str
    count: int
    layer: str | None
    layers: tuple[Risk, ...]
    not_attacked: tuple[str, ...]
    statistics: tuple[str, ...]
    result: Reconstruction
    truth: Tensor | None
    outcome: Comparison | None
    reaches: tuple[Reach, ...]
    defences: tuple[Tested, ...]
    picture: tuple[int, ...]
    time_limit: float | int
    trial_limit: float | int
    seconds: float
    memory: int

    @property
    def in_time(self) -> bool:
        """Whether the attack ended by itself, not by its time limit."""
        return self.result.stats.seconds < self.time_limit

    @property
    def status(self) -> int:
        """0 where nothing was recovered, 1 where something was: the exit status of `spear audit`."""
        return int(len(self.result.inputs) > 0)


@remembered()
def audit(
    model: nn.Module,
    update: SharedUpdate | None = None,
    *,
    name: str = "model",
    data: str | None = None,
    count: int | None = None,
    layer: str | None = None,
    input_shape: tuple[int, ...] | None = None,
    time_limit: float | int = 60,
    trial_limit: float | int = 5,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Audit:
    """Attack `update` on `model`, or else the gradient of a sample batch, and try what would have stopped it.

    `data` is what simulated clients hold (`spear.audit.sample.choose`) and `count` their batch size: by default 16,
    with an update the batch size that it shows. `layer` is the linear layer to attack, by default the first that reads
    the data, or else the first that a ReLU follows, and through its features what computes them. `input_shape` is
    needed where neither update nor model show it. `time_limit` bounds the attack on the update and `trial_limit` each
    simulated one (seconds). `progress` is called with a few words before each part.

    Where an update is given but no client can be simulated (a model of two inputs), only the update is attacked.

    Raises `ValueError` for a model that cannot be traced or has no layer that can be attacked, alone or with
    others, and as `spear.attack` and `spear.audit.sample.choose` do.
    """
    check_number("time_limit", time_limit, 0)
    check_number("trial_limit", trial_limit, 0)
    check_number("count", count, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    check_told({"input_shape": input_shape})
    started, say = time.monotonic(), progress or (lambda words: None)
    model = unwrapped(model)
    check_there(model)
    shape = input_shape or (update.input_shape if update else None)
    layers = assess(model, shape)
    target = _target(layers, layer)
    options = Options(None if target.from_data and layer is None else target.name, trial_limit, seed, device)
    simulated = count or (COUNT if target.rows == 1 else min(COUNT, max(1, target.limit // 2)))
    _check_size(simulated, target.inputs)
    most = max(min(target.limit, LARGEST // target.inputs), protection.AGGREGATED * simulated)
    sample, words = _sample(model, update, data, shape, most, seed)
    say("attack on the update" if update else "attack on a simulated update")
    attacked = update or gradient(model, *sample.take(simulated))
    front = layer is None and cut(model, shape) is not None  # of the features that enter the layer, the samples too
    result = replace(options, layer=None if front else options.layer, time_limit=time_limit).attack(model, attacked)
    entered = result.features_of or (None if front and len(result.inputs) else options.layer)
    if options.layer is None and entered:  # the gradient of the first layer is not sent
        options = replace(options, layer=entered)
    count = count or (result.rank if update else simulated)
    truth = None if update else simulation.entering(model, entered, sample.inputs[:count])
    reaches = _reaches(model, sample, count, target, options)
    defences = _defences(model, result, sample, count, options)
    tried = side_by_side.all_of(reaches | defences, say)
    return Audit(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        source="an update" if update else "a simulated update",
        sample=words,
        count=count,
        layer=entered,
        layers=layers,
        not_attacked=() if front and len(result.inputs) else _not_attacked(model, layers, target, options),
        statistics=leaks.statistics(model, shape),
        result=result,
        truth=truth,
        outcome=None if truth is None else simulation.compare(result, truth, sample.labels[:count]),
        reaches=tuple(tried[words] for words in reaches),
        defences=tuple(tried[words] for words in defences),
        picture=sample.picture if sample and entered is None else (target.inputs,),
        time_limit=time_limit,
        trial_limit=trial_limit,
        seconds=time.monotonic() - started,
        memory=peak_memory(),
    )


def _check_size(count: int, n: int) -> None:
    """Raises `ValueError` for simulated clients whose samples, of n entries, take more memory than is reasonable."""
    if protection.AGGREGATED * count * n > LARGEST:
        most = LARGEST // (protection.AGGREGATED * n)
        raise ValueError(
            f"a simulated client of {count:,} samples is too large: at most {most:,} of {n:,} entries each"
        )


def peak_memory() -> int:
    """The largest resident set that this process, or one that it has begun, has had, in bytes."""
    peak = max(resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else 1024 * peak


def assess(model: nn.Module, shape: tuple[int, ...] | None = None) -> tuple[Risk, ...]:
    """Every linear layer of the model and what it gives away; `shape` is that of a sample. Raises `ValueError` where
    the model cannot be traced."""
    joint = leaks.jointly(model, shape)
    found = [_risk(layer) for layer in tracing.linear_layers(model, shape)]
    return tuple(replace(risk, **joint.get(risk.name, {})) for risk in found)


def _risk(layer: Layer) -> Risk:
    m, n = layer.linear.weight.shape
    limit = min(m - 1, n) if layer.relu and not layer.obstacle else 0
    affordable = 0
    while affordable < limit and _proposals(m, affordable + 1) <= inversion.AFFORDABLE:
        affordable += 1
    return Risk(
        name=layer.name,
        inputs=n,
        width=m,
        bias=layer.linear.bias is not None,
        relu=layer.relu,
        from_data=layer.from_data,
        obstacle=layer.obstacle,
        limit=limit,
        sampling=affordable,
    )


def _proposals(width: int, batch: int) -> float:
    return theory.expected_proposals(theory.half_rates(width, batch))


def _target(layers: tuple[Risk, ...], name: str | None) -> Risk:
    """The layer to attack."""
    known = ", ".join(risk.name for risk in layers) or "none"
    if name is not None and name not in [risk.name for risk in layers]:
        raise ValueError(f"no linear layer named {name!r}; the model's linear layers: {known}")
    chosen = [risk for risk in layers if risk.limit and name in (None, risk.name)]
    if not chosen:
        raise ValueError(f"no ReLU follows {name or 'any linear layer'}: this attack has nothing to read ({known})")
    return max(chosen, key=lambda risk: risk.from_data)  # the first of those that read the data, or else the first


def _not_attacked(model: nn.Module, layers: tuple[Risk, ...], target: Risk, options: Options) -> tuple[str, ...]:
    """The parts of the model with weights of their own that no attack here reads, in words, and why."""
    risks, whole = {risk.name: risk for risk in layers}, options.layer is None and tracing.is_chain(model)
    if options.layer is None and any(risk.jointly for risk in layers):
        return ()
    words, parts = [], cut(model)
    read = set() if parts is None else {name for name, _ in parts.front.named_modules()}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if name in read and parts.layer == target.name:
            words.append(f"{name} ({type(module).__name__}: what it gives {target.name} leaks, the images often too)")
        elif name not in risks:
            words.append(f"{name or 'the model'} ({type(module).__name__}: no attack here reads it)")
        elif name != target.name and not whole:
            words.append(f"{name} ({f'only {target.name} was attacked' if risks[name].relu else 'no ReLU follows'})")
    return tuple(words)


def _sample(
    model: nn.Module,
    update: SharedUpdate | None,
    data: str | None,
    shape: tuple[int, ...] | None,
    most: int,
    seed: int,
) -> tuple[Sample | None, str]:
    """What simulated clients hold, in the model's precision, in words; with an update, none where there are none."""
    try:
        shape = input_shape(model, shape)
        sample = choose(data, shape, outputs(model, shape), most=most, seed=seed)
        sample = replace(sample, inputs=sample.inputs.to(next(model.parameters())))
        gradient(model, *sample.take(2))  # batch normalisation needs two
    except ValueError as error:
        if update is None:
            raise
        return None, f"nothing: {error}"
    return sample, sample.words


def _reaches(
    model: nn.Module, sample: Sample | None, count: int, target: Risk, options: Options
) -> dict[str, Callable[[], Reach]]:
    """Searches for the largest batch of each method, yet to be made."""
    if sample is None:
        return {}
    most = min(target.limit, len(sample.labels))
    return {
        f"largest batch by {method}": partial(
            simulation.reach, model, sample, method, most=most, first=count, options=options
        )
        for method in inversion.METHODS
        if method != "auto"
    }


def _defences(
    model: nn.Module, result: Reconstruction, sample: Sample | None, count: int, options: Options
) -> dict[str, Callable[[], Tested]]:
    """Defences, yet to be tried, on the recovered batch where it came back whole, else on the sample."""
    if sample is None:
        return {}
    own = sample
    if result.complete and options.layer is None and result.labels is not None:
        inputs = result.inputs.reshape(-1, *sample.inputs.shape[1:]).to(sample.inputs)
        own = Sample(inputs, result.labels, "the recovered batch", sample.picture)
    return protection.trials(model, own, min(count, len(own.labels)), others=sample, options=options)
