"""The attack: from a model and a client's update to the batch behind it. Nothing here ever sees the batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from spear.blocks.behind import behind_tokens
from spear.blocks.recover import FeedForward
from spear.blocks.recover import recover as recover_block
from spear.blocks.view import open_block
from spear.certificate import SAFETY
from spear.deployments import claims, noise, pruning, unknown
from spear.deployments.local_training import retrace
from spear.deployments.opening import holds_few_values, open_noisy
from spear.descent.dictionary import Dictionary
from spear.descent.layer import Coupled
from spear.federated import decoding, reparametrised
from spear.federated.naming import unwrapped
from spear.federated.received import check_gradients
from spear.federated.returned import as_given
from spear.federated.update import SharedUpdate, as_gradient, is_perturbed
from spear.fronts.recovery import behind
from spear.models.fronts import cut
from spear.models.memory import remembered
from spear.models.tracing import Sent, next_sent
from spear.network import whole_batch
from spear.network.problem import NetworkView, open_network, plain
from spear.normalisation import entry
from spear.normalisation.opening import open_normalised
from spear.normalisation.recover import recover as recover_normalised
from spear.published.algorithm import Sampling
from spear.published.guided import Guided
from spear.published.one_layer import AFFORDABLE, attack_layer, hopeless
from spear.published.view import LayerView, open_layer
from spear.reconstruction import Budget, Progress, Reconstruction, Refusal, Terms, check_number, larger

COARSE = 1e-6  # rounding of a gradient, relative to it, that is noise: of weights in single precision a step apart


@dataclass(frozen=True)
class Network:
    """Every layer of a fully connected network; it has no options."""

    name: ClassVar[str] = "network"


@dataclass(frozen=True)
class Auto:
    """The strongest method whose preconditions hold, and the next where it ends without the whole batch.

    `sampling` are the options of the last of them.
    """

    name: ClassVar[str] = "auto"
    sampling: Sampling = field(default_factory=Sampling)


Method = Auto | Sampling | Guided | Dictionary | Coupled | FeedForward | Network
_BY_NAME = {kind.name: kind for kind in (Auto, Sampling, Guided, Dictionary, Coupled, FeedForward, Network)}
METHODS = tuple(_BY_NAME)


def attack(
    model: nn.Module,
    update: SharedUpdate,
    *,
    method: str | Method = "auto",
    layer: str | None = None,
    batch_size: int | None = None,
    time_limit: float | int | None = None,
    max_proposals: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Callable[[Progress], str | None] | None = None,
) -> Reconstruction:
    """Recover the batch behind a client's update (SPEAR, Algorithm 1, and beyond it).

    `method` says how much is used, by its name, or with options of its own, as in `Sampling(false_rejection=1e-6)`. Of
    one linear layer that a ReLU follows: `"sampling"`, SPEAR as published; `"guided"`, sampling where guesses of the
    batch point (`Guided(approximate=images)`); `"dictionary"`, its gradient as sparse vectors in a subspace;
    `"layer"`, its weights and gradient coupled (batches of up to a third of its width). Of two linear layers with any
    elementwise activation between, whatever is around them: `"block"` (a transformer's feed-forward blocks, gated or
    not: the tokens of all samples that enter them, up to a third of the width in number). Of a fully connected network:
    `"network"`, every layer, whatever its elementwise activations (batches of hundreds). `"auto"` is the strongest
    method whose preconditions hold, and the next where it ends without the whole batch; `Reconstruction.method` says
    which it was.
    `layer` names the one linear layer, the default being the first whose input is the data up to reshaping, or, where
    its gradient was not sent, the next whose was: then the features that enter it come. Of one layer (a private head:
    the update holds that layer's gradient only, and `model` ends with its ReLU or goes on with weights that are not the
    client's) inputs come without labels, and up to their length, which what reads the layer pins (`certify_layer`).
    What a client did beside what it says is read off the update, undone and said: the sign, a factor of all or of each
    tensor, weight decay, the first step of Adam and its kin, another loss, steps (`spear.federated.decoding`). Where no
    labels explain the gradients, samples come without, and with `Reconstruction.targets` under a squared error.
    `batch_size` is read off the gradient's rank unless given, and nothing is certified where neither it nor the update
    says it (`spear.certificate`); of several local steps it is the number of samples in all. `time_limit` (seconds)
    bounds the searches of all methods together, `max_proposals` (kernels that sampling tests, starts of the others)
    each of them: an exhausted budget gives an incomplete result that says so. Without either, sampling declines a batch
    too large for any budget at once.
    From rounded or noisy gradients of a fully connected network, `"auto"` and `"network"` return samples with an
    `expected_error`, `"dictionary"` and `"layer"` without one; neither are certified. From several local steps (FedAvg)
    the former retrace the training. The result depends on `seed`, not on the device. `progress` is called after each
    round of every method; words that it returns end the search, and what was found comes back with them as its reason.

    Raises `ValueError` for a method or a layer that does not exist, a limit or batch size that is negative or no finite
    number, and for gradients of another shape than the weights, not finite or zero everywhere; its subclass `Refusal`
    where no method can begin: a layer that no ReLU follows, a model that cannot be traced, gradients that are missing,
    a batch that is too large for the layer (b >= m, or b > n), half precision for sampling. Raises `TypeError` for an
    option that a method does not have.
    """
    check_number("time_limit", time_limit, 0)
    check_number("max_proposals", max_proposals, 0, whole=True)
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("seed", seed, 0, whole=True)
    chosen = _chosen(method, layer)
    terms = Terms(Budget(time_limit, max_proposals), seed, progress)
    with remembered():
        model = unwrapped(model)
        read = decoding.read(model, update)
        model, sent_as, computed = reparametrised.plain(model, read.update)
        read = replace(read, update=sent_as, words=(*read.words, *[computed] * bool(computed)))
        doubted = claims.contradicted(model, read.update)
        sent = next_sent(model, read.update.gradients, read.update.input_shape) if layer is None else Sent(layer)
        fixed, found = entry.with_entry(model, read.update)
        request = Request(fixed, read.update, sent.layer, batch_size, device, terms, doubted)
        result = as_given(fixed, read.update, sent.layer, _through(request, chosen))
        result = entry.confirmed(model, read.update, result, found)
    if read.error:  # of all lengths alike
        result = result.less_certain(SAFETY * read.error)
    if read.doubt and bool(result.certified.any()):
        nobody = torch.zeros_like(result.certified)
        result = replace(result, certified=nobody, complete=False, reason=f"{result.reason}; {read.doubt}")
    told = [words for _, words in terms.budget.ended if not result.complete and words not in result.reason]
    said = [result.reason + (request.denial if doubted else ""), *told, *sent.words, *read.words]
    return replace(result, reason="; ".join(said), stats=replace(result.stats, seconds=terms.budget.elapsed))


def _through(request: "Request", method: Method) -> Reconstruction:
    """The result; where features enter the layer, first they, then what a front computes them from."""
    update, found = request.update, None
    if request.layer is None and update.local_steps == 1 and update.pruning is None:
        found = cut(request.model, update.input_shape)
    if found is None or isinstance(method, FeedForward):
        return _as_read(request, method)
    check_gradients(request.model, as_gradient(update) if is_perturbed(update) else update)
    head = replace(update, gradients=found.of_head(update.gradients), input_shape=None)
    try:
        result = _as_read(replace(request, model=found.head, update=head), method)
    except Refusal as refusal:
        return _before(request, method, refusal)
    return behind(found, request.model, update, result, request.terms)


def _before(request: "Request", method: Method, refusal: Refusal) -> Reconstruction:
    """What a block before the head gives where the head refuses; raises `Refusal` where there is none."""
    if not isinstance(method, Auto):
        raise refusal
    try:
        return request.run(FeedForward())
    except Refusal as error:
        raise Refusal(f"{refusal}; before the head: {error}") from None


def _as_read(request: "Request", method: Method) -> Reconstruction:
    """The result with what was told; where that explains no inputs' labels, with a loss or steps that do."""
    update, result, refusal = request.update, None, None
    try:
        result = request.attack(method)
    except Refusal as error:
        if update.local_steps == 1:
            raise
        refusal = error
    labelled = result is not None and (result.labels is not None or bool(result.features_of))
    explained = labelled or (result is not None and not len(result.inputs))
    whole = explained and (_distinct(result) >= result.rank or result.expected_error is not None)
    if request.layer is None and not whole:
        losses = () if explained or update.local_steps > 1 else decoding.other_losses(update)
        seen = update.local_steps > 1 or len(result.inputs) > 0
        steps = decoding.other_steps(update) if isinstance(method, Auto | Network) and seen else ()
        for reading in (*steps, *losses):
            if request.terms.budget.spent(0):
                break
            found = _with(request, reading, method)
            if found is not None:
                return replace(found, reason="; ".join([found.reason, *reading.words]))
    if result is None:
        raise refusal
    return result


def _distinct(result: Reconstruction) -> int:
    return len(torch.unique(result.inputs.flatten(1), dim=0)) if len(result.inputs) else 0


def _with(request: "Request", reading: decoding.Reading, method: Method) -> Reconstruction | None:
    """What comes of another reading; `None` where that does not explain the whole batch."""
    several = reading.update.local_steps > 1
    try:
        found = replace(request, update=reading.update).attack(Network() if several else method)
    except Refusal:
        return None
    labelled = found.labels is not None and found.expected_error is None and _distinct(found) >= found.rank
    return found if (found.complete if several else labelled) else None


def _chosen(method: str | Method, layer: str | None) -> Method:
    """The method with its options. Raises `ValueError` as `attack` does."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known methods: {', '.join(METHODS)}")
        method = _BY_NAME[method]()
    if isinstance(method, Network) and layer is not None:
        raise Refusal(f"method 'network' uses every layer: layer={layer!r} cannot be chosen")
    return method


@dataclass(frozen=True)
class Request:
    """What the server has: model and update, which layer and how many samples it was told, where to compute; terms.

    `doubted` says that the update does not show what its client claims to have done to it.
    """

    model: nn.Module
    update: SharedUpdate
    layer: str | None
    batch_size: int | None
    device: str | torch.device | None
    terms: Terms
    doubted: bool = False

    @property
    def believed(self) -> SharedUpdate:
        """The update with what its client claims, unless that is contradicted."""
        return claims.without(self.update) if self.doubted else self.update

    @property
    def denial(self) -> str:
        """That the update does not show what its client claims, for a reason's end."""
        return f"; the client claims {claims.words(self.update)}: the update does not show it"

    def attack(self, method: Method) -> Reconstruction:
        """One method, or those of `auto` in turn. Raises `Refusal` where none can begin."""
        return _strongest(self, method) if isinstance(method, Auto) else self.run(method)

    def run(self, method: Method) -> Reconstruction:
        """One method. Raises `Refusal` where it cannot begin."""
        if isinstance(method, Network):
            return self._every_layer()
        if isinstance(method, FeedForward):
            return self._block()
        return attack_layer(self._view(method.stands_noise), method, self.terms, self.device)

    def _block(self) -> Reconstruction:
        """Two layers, and through their tokens the samples; from exact gradients."""
        if is_perturbed(self.believed) or self.believed.pruning is not None:
            raise Refusal("the gradients of a block are read as they were computed: not rounded, pruned or with noise")
        update = self.believed
        view = open_block(self.model, update, layer=self.layer, batch_size=self.batch_size, device=self.device)
        found, tokens = recover_block(view, self.terms)
        if self.layer is not None or len(tokens) < view.rank:
            return found
        return behind_tokens(self.model, update, view, tokens, found, self.terms)

    def _view(self, noise: bool) -> LayerView:
        """The one layer; for a method that stands noise also from a gradient that was rounded or has noise on it."""
        update = as_gradient(self.believed) if noise and is_perturbed(self.believed) else self.believed
        return open_layer(self.model, update, layer=self.layer, batch_size=self.batch_size, device=self.device)

    def _every_layer(self) -> Reconstruction:
        """Every layer, by what the update shows; where that is not what the client claims, by the one and the other."""
        told = self.update
        if told.local_steps > 1:
            return retrace(self.model, told, self.batch_size, self.device, self.terms)
        if not claims.words(told):
            return self._as_disclosed(told)
        plain, found, refusals = claims.without(told), None, []
        for update in (plain, told) if self.doubted else (told, plain):
            try:
                new = self._as_disclosed(update)
            except Refusal as refusal:
                refusals.append(refusal)
                continue
            if update is plain and len(new.inputs) and not self.doubted:
                new = replace(new, reason=new.reason + self.denial)
            found = new if found is None or len(new.inputs) else found
            if len(found.inputs) or self.terms.budget.spent(0):
                break
        if found is None:
            raise refusals[0]
        return found

    def _as_disclosed(self, told: SharedUpdate) -> Reconstruction:
        """Every layer, for what is disclosed: noise or rounding, pruning, or nothing of these."""
        if told.has_unknown:
            return self._completed(told)
        if is_perturbed(told):
            return noise.denoise(self.model, told, self.batch_size, self.device, self.terms)
        try:
            network = open_network(self.model, told, batch_size=self.batch_size, device=self.device)
        except Refusal:
            view = open_normalised(self.model, told, batch_size=self.batch_size, device=self.device)
            if view is None:
                raise
            return recover_normalised(view, self.terms)
        if told.pruning is not None:
            cut = unknown.marked(told)
            found = None if cut is None else self._completed(cut)
            return found if found is not None and len(found.inputs) else pruning.recover(plain(network), self.terms)
        return self._exact_or_not(network, told)

    def _completed(self, told: SharedUpdate) -> Reconstruction:
        """Every layer, the entries that are not known completed."""
        return unknown.recover(self.model, told, self.batch_size, self.device, self.terms)

    def _exact_or_not(self, network: NetworkView, told: SharedUpdate) -> Reconstruction:
        """What every layer gives exactly, or though rounding, cuts, missing entries or noise were not disclosed."""
        plain_relu = network.is_relu and not network.folded
        rounded = plain_relu and holds_few_values(network)
        found = noise.recover(open_noisy(network.widened, told), self.terms) if rounded else None
        if found is not None and len(found.inputs):
            return found
        cut = unknown.marked(told) if plain_relu and not rounded else None
        completed = None if cut is None else self._completed(cut)
        if completed is not None and len(completed.inputs):
            return completed
        exact = whole_batch.recover(network, self.terms)
        if len(exact.inputs) or rounded or not plain_relu:
            return exact if found is None else larger(found, exact)
        if self.terms.budget.spent(0):
            return exact
        if pruning.is_pruned(network):
            return pruning.recover(network.widened, self.terms)
        opening = open_noisy(network.widened, told)
        seen = network.precision > COARSE or opening.is_visible
        found = noise.recover(opening, self.terms) if seen else exact
        # Samples that the layers merge leave fewer directions, and pass for noise: the estimate's errors mean nothing.
        sure = len(found.inputs) >= (network.batch_size or 1) or (len(found.inputs) and opening.is_even)
        return found if sure else exact

    def following(self, auto: Auto) -> Iterator[Method]:
        """The methods that `auto` tries in turn; sampling does not stand noise."""
        if self.layer is None:
            yield Network()
        yield Coupled()
        yield FeedForward()
        if not is_perturbed(self.believed):
            yield auto.sampling

    def worth(self, method: Method) -> bool:
        """Whether a method that follows another is worth its time: blocks are for what no other method reads."""
        if isinstance(method, FeedForward):
            return self.layer is not None
        if not isinstance(method, Sampling):
            return True
        return not hopeless(self._view(noise=False), self.terms.budget, AFFORDABLE)


def _strongest(request: Request, auto: Auto) -> Reconstruction:
    """Method after method until one recovers the whole batch, or expects errors; the best result.

    Raises `Refusal`, with what each method says, where none of them can begin.
    """
    result, refusals, spent = None, [], ""
    for method in request.following(auto):
        if result is not None and (len(result.inputs) >= result.rank or result.expected_error is not None):
            break
        if result is not None and (spent := request.terms.budget.spent(0)):
            break
        try:
            if result is not None and not request.worth(method):
                continue
            found = request.run(method)
        except Refusal as refusal:
            refusals.append(f"{method.name}: {refusal}")
            continue
        result = found if result is None else larger(result, found)
    if result is None:
        raise Refusal("; ".join(refusals))
    said = [] if result.complete else [*refusals, *[spent] * (spent not in result.reason)]
    return replace(result, reason="; ".join([result.reason, *said]))
