import os

import pytest

from nemo_ext import rewards
from nemo_ext.errors import UserError
from nemo_ext.rewards import reasoning_gym, sandbox


@pytest.fixture(scope="module")
def reward():
    try:
        sandbox.means()
    except UserError as error:
        pytest.skip(str(error))
    with rewards.build("reasoning-gym", timeout=1.5, workers=2) as built:
        yield built


def test_problems_are_the_packages_own():
    found = reasoning_gym.problems("chain_sum", 5, 7, max_terms=3)
    expected = reasoning_gym.package().create_dataset("chain_sum", size=5, seed=7, max_terms=3)
    assert found == [expected[place] for place in range(5)]
    assert {row["metadata"]["source_dataset"] for row in found} == {"chain_sum"}
    assert reasoning_gym.problems("chain_sum", 5, 7, max_terms=3) == found
    assert reasoning_gym.problems("chain_sum", 5, 8, max_terms=3) != found


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [("chain_some", {}, "there is no such task, did you mean chain_sum?"), ("chain_sum", {"nope": 1}, "nope"),
     ("chain_sum", {"min_terms": 5, "max_terms": 2}, "data=reasoning-gym:chain_sum:"), ("zebra_puzzles", {}, "pycosat")],
)  # fmt: skip
def test_problems_that_are_refused(task, config, message):
    with pytest.raises(UserError, match="data=reasoning-gym|zebra puzzles") as caught:
        reasoning_gym.problems(task, 1, 1, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_verifiers_of_several_tasks(reward):
    tasks = ("chain_sum", "countdown", "leg_counting", "spell_backward")
    rows = [row for task in tasks for row in reasoning_gym.problems(task, 2, 3)]
    reward.check(rows)
    right = [f"<think>so</think><answer>{row['answer'] or row['metadata']['expression']}</answer>" for row in rows]
    assert reward(right, rows) == pytest.approx([1.0] * len(rows))
    wrong = reward(["<answer>-987654</answer>"] * len(rows), rows)
    assert max(wrong) < 0.5
    bare = reward([row["answer"] for row in rows[:2]], rows[:2])
    assert bare == [1.0, 1.0]


def test_a_named_task_needs_no_name_in_the_rows(reward):
    row = reasoning_gym.problems("chain_sum", 1, 3)[0]
    row["metadata"] = {}
    with rewards.build("reasoning_gym:chain_sum:0.5", workers=1) as named:
        named.check([row])
        assert named([f"The answer is {row['answer']}"], [row]) == [0.5]
        assert named.weights == {"reasoning_gym:chain_sum": 0.5}
    with pytest.raises(UserError, match="do not say their task"):
        reward.check([row])
    with pytest.raises(UserError, match="no `metadata`"):
        reward.check([{"answer": "1"}])


def test_answers_that_a_verifier_would_run(reward, tmp_path):
    """string_insertion evaluates an answer as Python: what it says must not happen, and costs bounded time."""
    row = reasoning_gym.problems("string_insertion", 1, 1)[0]
    target = tmp_path / "made"
    evil = [f"[open({str(target)!r}, 'w').write('x')]", f"[__import__('os').system('touch {target}')]",
            "[open('/etc/passwd').read()]", "[str(9**9**9)]", "[x for x in iter(int, 1)]",
            "['x' * 10**12]", f"[__import__('os').kill({os.getpid()}, 9)]",
            "[__import__('socket').socket()]", "[__import__('os').fork()]"]  # fmt: skip
    found = reward.score([f"<answer>{text}</answer>" for text in evil], [row] * len(evil))
    assert found.total == [0.0] * len(evil)
    assert not target.exists()
    assert reward([row["answer"]], [row]) == [1.0]
