"""The whole attack on problems whose truth is known, and everything it must refuse."""

import math
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from problems import batch, make
from torch import nn

import spear
from spear import models
from spear.federated import SharedUpdate, gradient
from spear.inversion import METHODS
from spear.metrics import evaluate
from spear.published.algorithm import Sampling


def attack(model, update, **options):
    """SPEAR as published, where a test does not say otherwise."""
    return spear.attack(model, update, **{"method": "sampling"} | options)


def solved(problem, **options):
    result = attack(problem.model, problem.update, **options)
    return result, evaluate(result, problem.inputs, problem.labels)


@pytest.mark.parametrize("b", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_a_batch_comes_back_exactly(b, depth, seed):
    result, evaluation = solved(make(b, 120, 60, depth, seed=seed))
    assert result.complete, result.reason
    assert result.certified.all()
    assert result.rank == b
    assert float(evaluation.relative_error.max()) < 1e-9
    assert (evaluation.recall, evaluation.precision, evaluation.label_accuracy) == (1, 1, 1)
    assert float(result.residuals.max()) < 1e-9


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_reductions_and_precisions(reduction, dtype, seed):
    result, evaluation = solved(make(7, 120, 60, seed=seed, dtype=dtype, reduction=reduction))
    assert result.complete, result.reason
    assert evaluation.recall == evaluation.precision == evaluation.label_accuracy == 1


@pytest.mark.parametrize(
    ("b", "said"), [(40, "the budget of 10 proposals was spent"), (150, "2^149 proposals: 10 are far")]
)
def test_a_budget_that_is_far_from_enough_is_not_spent(b, said):
    problem = make(b, 200, 200)
    result = attack(problem.model, problem.update, max_proposals=10)
    assert said in result.reason
    assert result.stats.proposals > 0 or b > 40
    assert not len(result.inputs)


@pytest.mark.parametrize("seed", range(3))
def test_results_depend_on_the_seed_of_the_search_only_by_order(seed):
    problem = make(9, 120, 60)
    first, again, other = (attack(problem.model, problem.update, seed=s) for s in (seed, seed, seed + 1))
    assert torch.equal(first.inputs, again.inputs)
    assert evaluate(other, first.inputs, first.labels).recall == 1


@pytest.mark.parametrize("seed", range(3))
def test_scaling_the_loss_or_permuting_neurons_changes_nothing(seed):
    problem = make(6, 100, 50, seed=seed, reduction="sum")
    doubled = replace(
        problem.update, gradients={k: g / 6 for k, g in problem.update.gradients.items()}, reduction="mean"
    )
    assert evaluate(attack(problem.model, doubled), problem.inputs, problem.labels).recall == 1
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    model = models.fcnn((50,), 100, 3, 10, seed=seed)
    with torch.no_grad():
        model.fc1.weight.copy_(model.fc1.weight[order])
        model.fc1.bias.copy_(model.fc1.bias[order])
        model.fc2.weight.copy_(model.fc2.weight[:, order])
    permuted = attack(model, gradient(model, problem.inputs, problem.labels))
    assert permuted.complete
    assert evaluate(permuted, problem.inputs, problem.labels).recall == 1


@pytest.mark.parametrize("layer", ["fc1", "fc2", "fc3"])
def test_deeper_layers_give_their_own_inputs(layer):
    problem = make(5, 100, 50, depth=4)
    depth = int(layer[2:])
    features = problem.model[: 2 * depth - 1](problem.inputs).detach()
    result = attack(problem.model, problem.update, layer=layer)
    assert result.complete, result.reason
    assert evaluate(result, features, problem.labels).recall == 1


def test_inputs_have_the_shape_that_the_client_discloses():
    model = models.fcnn((3, 4, 4), 90, 3, 10)
    x, y = batch(4, 48)
    x = x.reshape(4, 3, 4, 4)
    update = gradient(model, x, y)
    assert attack(model, update).inputs.shape == (4, 3, 4, 4)
    assert attack(model, replace(update, input_shape=None)).inputs.shape == (4, 48)
    with pytest.raises(ValueError, match=r"disclosed input shape \(3, 4\) does not make the 48 inputs of fc1"):
        attack(model, replace(update, input_shape=(3, 4)))


def test_without_bias_inputs_come_up_to_scale_and_uncertified():
    problem = make(6, 100, 50, bias=False)
    result = attack(problem.model, problem.update)
    direction = problem.inputs / problem.inputs.norm(dim=1, keepdim=True)
    assert evaluate(result, direction).recall == 1
    assert not result.complete
    assert not result.certified.any()
    assert "fc1 has no bias, so each input is known up to a positive factor only" in result.reason
    assert torch.isinf(result.residuals).all()


@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy"])
@pytest.mark.parametrize("outputs", [1, 2, 10])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_layer_gives_images_and_labels_under_other_losses(loss, outputs, reduction):
    x, y = batch(6, 50, max(outputs, 2))
    model = models.fcnn((50,), 100, 3, outputs)
    update = gradient(model, x, y, loss=loss, reduction=reduction)
    result = attack(model, update, method="sampling")
    report = evaluate(result, x, y)
    assert (report.recall, report.precision, report.label_accuracy) == (1, 1, 1)
    assert result.complete, result.reason


def test_a_layer_with_a_branch_around_it_is_judged_alone():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = (nn.Linear(n, m).double() for n, m in ((40, 90), (90, 90), (90, 10)))

        def forward(self, x):
            h = self.a(x).relu()
            return self.out(h + self.b(h).relu())

    torch.manual_seed(0)
    model = Residual()
    x, y = batch(5, 40)
    update = gradient(model, x, y)
    assert attack(model, update).complete
    result = attack(model, update, layer="b")
    assert evaluate(result, model.a(x).relu().detach()).recall == 1
    assert not result.certified.any()
    assert result.labels is None
    assert "each image up to its length" in result.reason
    assert "depend on more than b, by a branch around it" in result.reason
    unknown = attack(model, replace(update, count=None), layer="b")
    assert len(unknown.inputs) == 5
    assert not unknown.certified.any()


@pytest.mark.parametrize("options", [{"max_proposals": 2000}, {"time_limit": 0.2}])
def test_an_exhausted_budget_is_an_honest_incomplete_result(options):
    problem = make(40, 150, 60)
    seen = []
    result = attack(problem.model, problem.update, progress=seen.append, **options)
    assert not result.complete
    assert result.inputs.shape == (0, 60)
    assert result.certified.shape == (0,)
    assert result.labels is None
    assert ("2,000 proposals was spent" if "max_proposals" in options else "time limit of 0.2 s") in result.reason
    assert "of 40 directions" in result.reason
    assert [p.proposals for p in seen] == sorted(p.proposals for p in seen)
    assert len(seen) == result.stats.rounds
    assert [p.rank for p in seen] == [40] * len(seen)
    assert result.stats.proposals == (seen[-1].proposals if seen else 0)


class Never(Executor):
    """Takes work and never does it."""

    def submit(self, *work, **options):
        return Future()


def test_the_time_limit_is_kept_while_a_round_is_waited_for():
    problem = make(12, 60, 60)
    result = attack(problem.model, problem.update, method=Sampling(executor=Never()), time_limit=0.1)
    assert "time limit of 0.1 s was reached: 0 of 12 directions" in result.reason
    assert (result.stats.proposals, result.stats.rounds) == (0, 0)


@pytest.mark.parametrize("b", [11, 20])
def test_the_result_does_not_depend_on_who_computes_the_rounds(b):
    problem = make(b, 150, 60)
    options = {"seed": 1}
    here = attack(problem.model, problem.update, **options)
    assert here.complete
    for workers in (1, 3):
        with ThreadPoolExecutor(workers) as executor:
            there = attack(problem.model, problem.update, method=Sampling(executor=executor), **options)
        assert torch.equal(there.inputs, here.inputs)
        assert torch.equal(there.labels, here.labels)
        assert (there.stats.proposals, there.stats.rounds) == (here.stats.proposals, here.stats.rounds)


@pytest.mark.parametrize("b", [8, 18])
def test_a_small_budget_is_kept(b):
    problem = make(b, 150, 60)
    result = attack(problem.model, problem.update, max_proposals=100)
    assert 100 <= result.stats.proposals < 100 + b
    assert not result.complete


def test_a_batch_beyond_any_budget_is_declined_at_once():
    problem = make(60, 150, 80)
    result = attack(problem.model, problem.update)
    assert not result.complete
    assert result.stats.proposals == 0
    assert "a batch of 60 needs about" in result.reason


def test_noise_without_a_gap_is_no_batch():
    problem = make(5, 60, 40)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        k: g + 0.3 * g.std() * torch.randn(g.shape, dtype=g.dtype, generator=generator)
        for k, g in problem.update.gradients.items()
    }
    result = attack(problem.model, SharedUpdate(noisy, count=5))
    assert not result.complete
    assert "shows no rank" in result.reason


@pytest.mark.parametrize(("value", "words"), [(math.nan, "are not known"), (math.inf, "holds NaN or infinite values")])
def test_gradients_that_are_not_finite(value, words):
    """One layer alone does not go on without an entry; `deployments.unknown` completes it."""
    problem = make()
    broken = {k: g.clone() for k, g in problem.update.gradients.items()}
    broken["fc2.weight"][3, 4] = value
    with pytest.raises(ValueError, match=f"the gradient of fc2.weight {words}"):
        attack(problem.model, SharedUpdate(broken))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    problem = make()
    half = {k: g.to(dtype) for k, g in problem.update.gradients.items()}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"fc1.weight is {name}: exact recovery needs float32 or float64"):
        attack(problem.model, SharedUpdate(half))
    with pytest.raises(ValueError, match=f"fc1.weight is {name}"):
        attack(problem.model.to(dtype), problem.update)


def without(update, name):
    return replace(update, gradients={k: g for k, g in update.gradients.items() if k != name})


def test_gradients_that_do_not_fit():
    problem = make()
    for name in ("fc1.weight", "fc1.bias"):
        with pytest.raises(ValueError, match=f"the update has no gradient for {name}; it has "):
            attack(problem.model, without(problem.update, name), layer="fc1")
        assert (
            f"what enters fc2: the update has no gradient for {name}"
            in attack(problem.model, without(problem.update, name)).reason
        )
    gradients = problem.update.gradients
    with pytest.raises(
        ValueError, match=r"the gradient of fc1.weight has shape \(80, 39\), the model's parameter \(80, 40\)"
    ):
        attack(problem.model, SharedUpdate({**gradients, "fc1.weight": gradients["fc1.weight"][:, 1:]}))
    with pytest.raises(ValueError, match="the update has a gradient for 'other', which the model does not have"):
        attack(problem.model, SharedUpdate({**gradients, "other": gradients["fc1.bias"]}))
    with pytest.raises(ValueError, match="the gradient has rank 0"):
        attack(problem.model, SharedUpdate({k: 0 * g for k, g in gradients.items()}))
    steps = replace(problem.update, local_steps=3)
    with pytest.raises(ValueError, match="an update of 3 local steps is not the gradient of one batch"):
        attack(problem.model, steps, method="layer")
    assert "the update is that of one step, told were 3" in attack(problem.model, steps, method="network").reason


def test_batches_too_large_for_the_layer():
    (x, y), (short, _) = batch(6, 40), batch(6, 5)
    wide, narrow = models.fcnn((40,), 6, 3, 10), models.fcnn((5,), 80, 3, 10)
    with pytest.raises(ValueError, match="a batch of rank 6 needs a layer wider than 6; fc1 has 6"):
        attack(wide, gradient(wide, x, y))
    with pytest.raises(ValueError, match="a batch of rank 6 needs at least 6 inputs; fc1 has 5"):
        attack(narrow, gradient(narrow, short, y))
    problem = make()
    with pytest.raises(ValueError, match="a batch of rank 90 needs a layer wider than 90; fc1 has 80"):
        attack(problem.model, problem.update, batch_size=90)
    with pytest.raises(ValueError, match="batch_size is a whole number of at least 1, not 0"):
        attack(problem.model, problem.update, batch_size=0)
    result = attack(wide, replace(gradient(wide, x, y), count=None))
    assert not result.complete
    assert "shows no rank" in result.reason


def test_methods_layers_and_devices():
    problem = make()
    with pytest.raises(ValueError, match="unknown method 'magic'; known methods: " + ", ".join(METHODS)):
        attack(problem.model, problem.update, method="magic")
    with pytest.raises(ValueError, match="no linear layer named 'fc7'"):
        attack(problem.model, problem.update, layer="fc7")
    with pytest.raises(ValueError, match="no ReLU follows fc3"):
        attack(problem.model, problem.update, layer="fc3")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' is not available"):
            attack(problem.model, problem.update, device="cuda")


def test_the_attack_leaves_model_and_update_alone():
    problem = make()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    gradients = {k: v.clone() for k, v in problem.update.gradients.items()}
    attack(problem.model, problem.update)
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert all(torch.equal(v, gradients[k]) for k, v in problem.update.gradients.items())
    assert all(p.requires_grad and p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("b", [6, 30])
@pytest.mark.parametrize("depth", [2, 3])
def test_auto_takes_the_strongest_method(b, depth):
    """A batch of 30 at width 120 is out of reach of sampling without a budget, and none is given."""
    problem = make(b, 120, 60, depth)
    result, evaluation = solved(problem, method="auto")
    assert result.complete, result.reason
    assert evaluation.recall == evaluation.precision == evaluation.label_accuracy == 1


def test_auto_samples_where_the_model_is_no_chain():
    model = nn.Sequential(nn.Linear(40, 90), nn.ReLU(), nn.LayerNorm(90), nn.Linear(90, 10)).double()
    x, y = batch(5, 40)
    update = gradient(model, x, y)
    with pytest.raises(ValueError, match="network method needs"):
        attack(model, update, method="network")
    result = attack(model, update, method="auto")
    assert result.complete, result.reason
    assert evaluate(result, x, y).recall == 1


def test_auto_samples_the_layer_that_is_named():
    problem = make(5, 100, 50, depth=4)
    features = problem.model[:3](problem.inputs).detach()
    assert evaluate(attack(problem.model, problem.update, method="auto", layer="fc2"), features).recall == 1
    with pytest.raises(ValueError, match="'network' uses every layer: layer='fc2' cannot be chosen"):
        attack(problem.model, problem.update, method="network", layer="fc2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_what_the_cpu_gives():
    problem = make(9, 120, 60)
    result, evaluation = solved(problem, device="cuda")
    assert result.inputs.device.type == "cuda"
    assert evaluation.recall == 1


def test_a_batch_of_16_real_images(real_data):
    x, y = spear.data.load("cifar10", count=16, seed=0, root=real_data)
    model = models.fcnn((3, 32, 32), width=400, depth=6, classes=10, seed=0)
    result = attack(model, gradient(model, x, y), seed=0)
    evaluation = evaluate(result, x, y)
    assert result.complete, result.reason
    assert float(evaluation.relative_error.max()) < 1e-9
    assert evaluation.label_accuracy == 1


@pytest.mark.parametrize("count", [8, None])
@pytest.mark.parametrize("seed", range(3))
def test_clipping_that_is_not_disclosed(seed, count):
    """With the batch size, all are certain, and their weights; without it all are returned, and none is."""
    problem = make(8, 150, 60, seed=seed)
    each = [
        gradient(problem.model, x[None], y[None]).gradients for x, y in zip(problem.inputs, problem.labels, strict=True)
    ]
    factors = torch.tensor([1.0] * 4 + [0.9, 0.7, 0.5, 0.3], dtype=torch.float64)
    clipped = {name: sum(f * one[name] for f, one in zip(factors, each, strict=True)) / 8 for name in each[0]}
    result = spear.attack(problem.model, replace(problem.update, gradients=clipped, count=count))
    evaluation = evaluate(result, problem.inputs, problem.labels)
    assert evaluation.recall == 1, result.reason
    assert result.complete == (count == 8)
    assert (result.certified == (count == 8)).all()
    if count:
        torch.testing.assert_close(result.weights[evaluation.match], factors / 8)


def test_the_time_limit_is_that_of_all_methods_together():
    inputs, labels = torch.randn(12, 30, dtype=torch.float64), torch.zeros(12, dtype=torch.long)
    model = models.fcnn((30,), 40, 3, 5, seed=0)
    result = spear.attack(model, gradient(model, inputs, labels), time_limit=0)
    assert not result.complete
    assert "gradient directions" in result.reason
    assert not any(method in result.reason for method in ("layer:", "sampling:"))


@pytest.mark.parametrize("method", ["sampling", "guided", "dictionary", "layer", "network", "auto"])
def test_words_of_the_progress_end_the_search(method):
    """No round follows, of this method or another; what was found until then comes back, with these words."""
    problem, seen = make(24, 120, 60, 3), []

    def enough(progress):
        seen.append(progress)
        return "that will do"

    result = attack(problem.model, problem.update, method=method, time_limit=60, progress=enough)
    assert len(seen) == 1
    assert ("that will do" in result.reason) != result.complete
