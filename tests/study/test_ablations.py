"""Grids of attacks: what a cell fixes, and what is measured."""

import itertools
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import spear
from spear import data, federated, metrics, models
from spear.metrics import truth
from spear.study import ablations
from spear.study.ablations import Cell, Limits

SMALL = Cell("digits", batch=3, width=40, depth=3)
BUDGET = Limits(proposals=20_000)


def client(cell, seed=0):
    inputs, labels = ablations.client_batch(cell, 512, seed)
    return models.fcnn((1, 8, 8), cell.width, cell.depth, 10, seed=seed), inputs, labels


def test_a_grid_is_the_product_of_its_values():
    cells = ablations.grid(SMALL, width=[30, 40], batch=[1, 2, 3])
    assert [(c.width, c.batch) for c in cells] == list(itertools.product([30, 40], [1, 2, 3]))
    assert {(c.dataset, c.depth) for c in cells} == {("digits", 3)}
    assert ablations.grid(SMALL) == [SMALL]


def test_a_run_is_the_loop_over_cells_and_batches():
    cells = ablations.grid(SMALL, method=["network", "sampling"], batch=[2, 4])
    frame = ablations.run(cells, batches=2, seed=3, limits=BUDGET)
    assert list(zip(frame.method, frame.batch, frame.number, strict=True)) == [
        (c.method, c.batch, n) for c in cells for n in range(2)
    ]
    for row in frame.itertuples():
        model, inputs, labels = client(Cell("digits", row.batch, 40, 3), 3 + row.number)
        budget = None if row.method == "network" else 20_000
        result = spear.attack(model, federated.gradient(model, inputs, labels), method=row.method, max_proposals=budget)
        report = metrics.evaluate(result, inputs, labels)
        assert (row.recall, row.complete, row.rank) == (report.recall, result.complete, result.rank)
        assert (row.proposals, row.reason) == (result.stats.proposals, result.reason)
        assert row.psnr == pytest.approx(float(report.psnr.mean()))
        assert row.error == pytest.approx(float(report.relative_error.max()))


def test_cells_that_share_a_network_differ_by_what_they_vary_alone():
    frame = ablations.run(ablations.grid(SMALL, method=["sampling", "network"]), batches=2, limits=BUDGET)
    assert (frame.recall == 1).all()
    alone = ablations.run([SMALL], batches=2, limits=BUDGET)
    columns = [name for name in alone if name != "seconds"]
    pd.testing.assert_frame_equal(frame[frame.method == "sampling"][columns], alone[columns])


def test_clients_that_share_a_network_take_batches_of_their_own(monkeypatch):
    built, batches = [], []
    made, taken = ablations._build, ablations.client_batch
    monkeypatch.setattr(ablations, "_build", lambda cell, seed: built.append(seed) or made(cell, seed))
    monkeypatch.setattr(ablations, "client_batch", lambda *of: batches.append(taken(*of)) or batches[-1])
    frame = ablations.run([SMALL], batches=5, seed=3, limits=BUDGET, networks=2)
    assert built == [3, 4]
    assert frame.number.tolist() == list(range(5))
    pools = [data.load("digits", count=512, seed=seed)[0][:9] for seed in (3, 4)]
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.cat([pools[0], pools[1][:6]]))
    alone = ablations.run([SMALL], batches=2, seed=3, limits=BUDGET)
    assert frame.proposals[:2].tolist() == alone.proposals.tolist()


def test_training_goes_on_from_cell_to_cell_whatever_their_order():
    steps = [7, 0, 3]
    frame = ablations.run(ablations.grid(SMALL, optimizer=["adam"], steps=steps), batches=1, limits=BUDGET)
    assert frame.steps.tolist() == steps
    assert frame.spread.nunique() == 3
    model, inputs, labels = client(SMALL)
    optimizer = ablations.OPTIMIZERS["adam"](model.parameters())
    public = [part[256:] for part in data.load("digits", count=512)]
    for begin, count in ((0, 3), (3, 4)):
        ablations.train(model, optimizer, *public, steps=count, seed=begin)
        again = truth.shape_of(*reversed(truth.layer_truth(model, "fc1", inputs, labels)))
        assert frame[frame.steps == begin + count].spread.item() == again.spread


def test_training_lowers_the_loss_and_leaves_float64():
    model, _, _ = client(SMALL)
    inputs, labels = data.load("digits", count=256)
    before = F.cross_entropy(model(inputs), labels)
    optimizer = ablations.OPTIMIZERS["sgd"](model.parameters())
    ablations.train(model, optimizer, inputs, labels, steps=60)
    assert F.cross_entropy(model(inputs), labels) < before / 1.2
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(p.grad is None for p in model.parameters())


def test_a_deeper_layer_is_judged_by_its_own_inputs():
    frame = ablations.run(
        ablations.grid(Cell("digits", batch=3, width=80, depth=4), layer=["fc1", "fc2"]), batches=2, limits=BUDGET
    )
    assert (frame.recall == 1).all()
    assert (frame.label_accuracy == 1).all()


@pytest.mark.parametrize(("sent", "widened"), [("float64", False), ("float32", False), ("float16", True)])
def test_what_is_sent_has_the_precision_asked_for(sent, widened):
    model, inputs, labels = client(SMALL)
    update = ablations.send(Cell("digits", sent=sent, widened=widened), model, inputs, labels)
    exact = federated.gradient(model, inputs, labels).gradients
    for name, g in update.gradients.items():
        assert g.dtype == (torch.float32 if widened else getattr(torch, sent))
        assert torch.equal(g, g.to(getattr(torch, sent)).to(g.dtype))
        assert torch.allclose(g.double(), exact[name], rtol=1e-2, atol=1e-4)
    assert next(model.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sent": "bfloat16"}, "bfloat16"),
        ({"activation": "GELU"}, "no ReLU follows fc1"),
        ({"batch": 41}, "needs a layer wider than 41"),
    ],
)
def test_what_the_attack_refuses_is_an_outcome(changed, message):
    (row,) = ablations.run(ablations.grid(SMALL, **{k: [v] for k, v in changed.items()}), batches=1).itertuples()
    assert row.reason.startswith("refused: ")
    assert message in row.reason
    assert (row.recall, row.precision, row.complete, row.psnr) == (0, 1, False, 0)
    assert math.isnan(row.error)


def test_equal_labels_are_of_one_class_and_of_the_clients_half():
    inputs, labels = ablations.client_batch(Cell("digits", batch=8, labels="equal"), 512, 4)
    assert len(inputs) == 8
    assert labels.unique().numel() == 1
    everything = data.load("digits", count=256, seed=4)[0]
    assert all((everything == x).flatten(1).all(1).any() for x in inputs)


def test_bad_cells():
    with pytest.raises(ValueError, match="unknown optimizer 'lion': use one of sgd, adam"):
        Cell(optimizer="lion")
    with pytest.raises(ValueError, match="unknown labels 'sorted': use one of random, equal"):
        Cell(labels="sorted")
    with pytest.raises(ValueError, match="a pool of 8 has 4 samples for a batch of 5: enlarge the pool"):
        ablations.run([Cell("digits", batch=5)], batches=1, pool=8)


def test_a_batch_out_of_time_counts_with_what_came_back():
    (row,) = ablations.run([SMALL], batches=1, limits=Limits(seconds=1e-9)).itertuples()
    assert not row.complete
    assert "time" in row.reason


def test_cells_that_a_data_set_cannot_fill_are_left_out():
    cells = ablations.grid(Cell("digits"), labels=["random", "equal"], batch=[4, 12, 30])
    left = ablations.feasible(cells, batches=2, pool=60)
    assert [(c.labels, c.batch) for c in left] == [("random", 4), ("random", 12), ("random", 30), ("equal", 4)]
    for cell in left:
        assert len(ablations.client_batch(cell, 60, 1)[1]) == cell.batch
