"""Advantages by hand, and orders that a resumed run finds again."""

import math

import pytest
import torch

from nemo_ext.grpo.advantages import advantages, equal_groups, problem_order, spare_problems, step_seed

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 2.0]])


def test_of_the_group_mean_and_deviation():
    found = advantages(REWARDS, normalize=True, leave_one_out=False)
    first = 0.5 / (math.sqrt(4 * 0.25 / 3) + 1e-6)
    last = [-0.5 / (1.0 + 1e-6)] * 3 + [1.5 / (1.0 + 1e-6)]
    expected = [[first, -first, -first, first], [0.0] * 4, last]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_without_the_deviation():
    found = advantages(REWARDS, normalize=False, leave_one_out=False)
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [-0.5, -0.5, -0.5, 1.5]]))


def test_against_the_mean_of_the_others():
    found = advantages(REWARDS, normalize=False, leave_one_out=True)
    third = 1 / 3
    expected = [[1 - third, -2 * third, -2 * third, 1 - third], [0.0] * 4, [-2 * third] * 3 + [2.0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    scaled = advantages(REWARDS, normalize=True, leave_one_out=True)
    torch.testing.assert_close(scaled[2], found[2] / (1.0 + 1e-6))  # the deviation stays the whole group's


def test_trl_computes_the_same_but_for_its_epsilon():
    """The formula of TRL 1.16.0, whose epsilon is 1e-4, for what both have."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 8, generator=generator)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages(rewards, True, False), theirs, rtol=1e-3, atol=0)


def test_a_reward_that_could_not_be_computed_counts_nowhere():
    found = advantages(torch.tensor([[1.0, 0.0, math.nan, 0.5]]), normalize=False, leave_one_out=False)
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.5, 0.0, 0.0]]))
    assert equal_groups(torch.tensor([[1.0, math.nan], [1.0, 0.0], [math.nan, math.nan]])).tolist() == [True, False, True]


def test_groups_with_equal_rewards():
    assert equal_groups(REWARDS).tolist() == [False, True, False]
    assert equal_groups(torch.tensor([[0.1 + 0.2, 0.3]])).tolist() == [True]


def test_the_order_of_problems_goes_on():
    whole = problem_order(10, 35, seed=3)
    assert problem_order(10, 25, seed=3) == whole[:25]
    assert sorted(whole[:10]) == list(range(10)) == sorted(whole[10:20])
    assert whole[:10] != whole[10:20]
    assert problem_order(10, 35, seed=4) != whole
    assert sorted(spare_problems(10, 3, 1)) == list(range(10))
    assert spare_problems(10, 3, 1) != spare_problems(10, 3, 2)


@pytest.mark.parametrize("seed", [0, 1234])
def test_seeds_of_steps(seed):
    found = [step_seed(seed, step) for step in range(100)]
    assert len(set(found)) == 100 and all(0 <= value < 2**31 for value in found)
    assert found == [step_seed(seed, step) for step in range(100)]
