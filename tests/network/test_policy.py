"""Which search comes next: cheap where starts arrive, longer and with the partner where they do not."""

from dataclasses import replace

import pytest

from spear.network.policy import Plan, Policy, Standing

EASY = Standing(width=400, rank=100, left=100, idle=0, classes=10, crowded=False, restricted=False, lowest=False)


def test_an_easy_problem_is_searched_cheaply_without_the_partner():
    assert Policy.at_first(crowded=False).plan(EASY) == Plan(
        free=False, starts=128, steps=100, weight=0.0, evened=False
    )


@pytest.mark.parametrize(
    ("rank", "starts", "steps"), [(119, 128, 100), (120, 256, 200), (179, 256, 200), (180, 256, 300)]
)
def test_harder_problems_get_more(rank, starts, steps):
    plan = Policy.at_first(crowded=False).plan(replace(EASY, rank=rank, left=400))
    assert (plan.starts, plan.steps) == (starts, steps)


@pytest.mark.parametrize(("left", "starts"), [(80, 120), (30, 45), (20, 32), (17, 32), (16, 32), (1, 32)])
def test_few_samples_need_few_starts(left, starts):
    assert Policy.at_first(crowded=False).plan(replace(EASY, left=left)).starts == starts


def test_near_the_end_every_class_starts_twice():
    plan = Policy.at_first(crowded=False).plan(replace(EASY, left=16, classes=20))
    assert plan.starts == 40
    assert Policy.at_first(crowded=False).plan(replace(EASY, left=16, classes=21)).starts == 32


@pytest.mark.parametrize("idle", range(8))
def test_rounds_that_found_nothing_make_the_next_longer(idle):
    assert Policy.at_first(crowded=False).plan(replace(EASY, idle=idle)).steps == 100 * min(1 + idle, 5)


@pytest.mark.parametrize(
    ("left", "lowest", "weight"),
    [(71, False, 0.0), (70, False, 0.5), (41, False, 0.5), (40, False, 1.0), (100, True, 0.2), (5, True, 0.2)],
)
def test_the_partner_comes_in_as_samples_are_found(left, lowest, weight):
    assert Policy.at_first(crowded=False).plan(replace(EASY, left=left, lowest=lowest)).weight == weight


def test_in_a_crowd_the_partner_takes_turns_with_evened_rows():
    crowd = replace(EASY, rank=160, left=160, crowded=True)
    policy = Policy.at_first(crowded=True)
    plans = [policy.plan(replace(crowd, idle=idle)) for idle in range(4)]
    assert [plan.evened for plan in plans] == [True, False, True, False]
    assert [plan.weight > 0 for plan in plans] == [False, True, False, True]


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
    assert policy.shares[False] == (0.25, 1)
    policy.learn(plan, plan.starts // 2, number=2, crowded=True)
    assert policy.shares[False] == (0.5, 2)


def test_where_starts_fail_without_the_partner_it_comes_in_early():
    policy = Policy.at_first(crowded=False)
    policy.learn(policy.plan(EASY), 12, number=1, crowded=False)
    assert policy.alone < 0.3
    assert policy.plan(EASY).weight == 0.5
