"""Which search comes next: cheap where starts arrive, longer and with the partner where they do not."""

from dataclasses import replace

import pytest

from spear.network.policy import Plan, Policy, Standing

EASY = Standing(
    width=400, rank=100, left=100, idle=0, classes=10, crowded=False, restricted=False, lowest=False, paired=False
)


def test_an_easy_problem_is_searched_cheaply_without_the_partner():
    assert Policy.at_first(crowded=False).plan(EASY) == Plan(
        kind="mean", starts=128, steps=60, partnered=False, paired=False
    )


@pytest.mark.parametrize(("rank", "steps"), [(119, 60), (120, 100), (179, 100), (180, 200)])
def test_harder_problems_get_more(rank, steps):
    assert Policy.at_first(crowded=False).plan(replace(EASY, rank=rank, left=400)).steps == steps


@pytest.mark.parametrize(("left", "starts"), [(80, 120), (30, 45), (20, 32), (17, 32), (16, 32), (1, 32)])
def test_few_samples_need_few_starts(left, starts):
    assert Policy.at_first(crowded=False).plan(replace(EASY, left=left)).starts == starts


def test_near_the_end_every_class_starts_twice():
    plan = Policy.at_first(crowded=False).plan(replace(EASY, left=16, classes=20))
    assert plan.starts == 40
    assert Policy.at_first(crowded=False).plan(replace(EASY, left=16, classes=21)).starts == 32


@pytest.mark.parametrize("idle", range(8))
def test_rounds_that_found_nothing_make_the_next_longer(idle):
    assert Policy.at_first(crowded=False).plan(replace(EASY, idle=idle)).steps == 60 * min(1 + idle, 5)


@pytest.mark.parametrize(
    ("left", "idle", "lowest", "partnered"),
    [(100, 0, False, False), (99, 0, False, True), (100, 1, False, True), (100, 0, True, True)],
)
def test_the_partner_comes_in_once_something_is_known(left, idle, lowest, partnered):
    at = replace(EASY, left=left, idle=idle, lowest=lowest)
    assert Policy.at_first(crowded=False).plan(at).partnered == partnered


def test_in_a_crowd_the_layer_below_is_searched_as_well():
    crowd = replace(EASY, rank=160, left=160, crowded=True, paired=True)
    policy = Policy.at_first(crowded=True)
    plan = policy.plan(crowd)
    assert plan.paired
    assert policy.plan(replace(crowd, idle=1)).steps == 2 * plan.steps
    policy.shares = {"mean": (0.1, 2), "free": (0.5, 1)}
    assert policy.plan(crowd).free
    assert not policy.plan(crowd).paired


def test_what_found_more_last_is_used_and_a_tie_goes_to_what_waited():
    policy = Policy.at_first(crowded=False)
    policy.learn(policy.plan(EASY), 0, number=1, crowded=False)
    assert policy.plan(EASY).free
    policy.learn(policy.plan(EASY), 0, number=2, crowded=False)
    assert not policy.plan(EASY).free
    assert not policy.plan(replace(EASY, restricted=True)).free


def test_one_failure_in_a_crowd_is_no_proof():
    policy = Policy.at_first(crowded=True)
    plan = policy.plan(replace(EASY, crowded=True, rank=160))
    policy.learn(plan, 0, number=1, crowded=True)
    assert policy.shares["mean"] == (0.25, 1)
    policy.learn(plan, plan.starts // 2, number=2, crowded=True)
    assert policy.shares["mean"] == (0.5, 2)
