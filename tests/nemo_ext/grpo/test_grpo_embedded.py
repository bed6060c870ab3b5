"""A run of the embedded engine in this process: what it writes, and that it goes on where it was."""

import datetime
import json
import os
import shutil
import signal

import pytest
import torch
from grpo_models import keys, prepare

from nemo_ext import faults, run_folder
from nemo_ext.errors import RunError, UserError
from nemo_ext.grpo import difficulty, embedded, evaluation
from nemo_ext.grpo.data import Problems
from nemo_ext.rewards import Reward


@pytest.fixture(autouse=True)
def handlers():
    """Signals of this process are as they were afterwards."""
    before = {each: signal.getsignal(each) for each in embedded.SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def weights(run_dir, step):
    from safetensors.torch import load_file

    return load_file(run_dir / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_group_of_one_waits_for_no_agent(monkeypatch):
    """vLLM makes a group of its own in a process that torchrun started: with the agent's variables it would wait for a store."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    embedded.leave_group()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    patience = datetime.timedelta(seconds=10)
    store, *place = next(torch.distributed.rendezvous("env://", timeout=patience))
    store.set("key", "value")
    assert store.get("key") == b"value" and place == [0, 1]


SETTINGS = dict(reward="length:100,numeric:0.5", kl=0.05, micro_batch=6, warmup=1, schedule="cosine", min_lr=1e-4)


@pytest.fixture(scope="module")
def whole(tiny, sums, tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    keys = prepare(run_dir, tiny, sums, **SETTINGS)
    embedded.train(keys, run_dir, str(tiny))
    return run_dir


def test_what_a_run_writes(whole):
    steps, evaluations = run_folder.read_records(whole)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in evaluations] == [0, 3, 6]
    for record in steps:
        numbers = (
            "loss lr grad_norm reward reward_std length kl entropy equal_groups cut_off step_time generation_time scoring_time"
        )
        assert all(isinstance(record[name], (int, float)) for name in numbers.split())
        assert record["reward"] == pytest.approx(100 * record["reward/length"] + 0.5 * record["reward/numeric"])
        parts = sum(record[f"{name}_time"] for name in ("generation", "scoring", "training"))
        assert record["step_time"] == pytest.approx(parts)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the first step is the reference itself
    assert steps[-1]["kl"] > 1e-5
    assert [record["tokens"] for record in steps] == sorted(record["tokens"] for record in steps)
    assert [record["lr"] for record in steps][:2] == pytest.approx([5e-4, 1e-3]) and steps[-1]["lr"] == pytest.approx(1e-4)
    assert [step for step, _ in run_folder.checkpoints(whole / "checkpoints")] == [4, 6]  # keep=2
    assert run_folder.read_status(whole)["phase"] == "finished"


def test_the_policy_learns_what_is_rewarded(tiny, sums, tmp_path):
    """Short answers pay: the model learns to end them."""
    keys = prepare(tmp_path, tiny, sums, reward="length:-1000", steps=25, lr=3e-3, max_answer=12, prompts=4, group=8, every=25,
                   val_every=25)  # fmt: skip
    embedded.train(keys, tmp_path, str(tiny))
    steps, evaluations = run_folder.read_records(tmp_path)
    assert steps[-1]["length"] < steps[0]["length"] - 2
    assert evaluations[-1]["val_reward_low"] > evaluations[0]["val_reward"]


def test_evaluations_keep_their_answers(whole):
    found = evaluation.compare(whole, 6)
    rows = [json.loads((whole / "evaluations" / f"step-{step:06d}.json").read_text())["answers"] for step in (0, 6)]
    means = [sum(row["reward"] for row in side) / len(side) for side in rows]
    assert found["reward_before"][0] == pytest.approx(means[0]) and found["reward_after"][0] == pytest.approx(means[1])
    assert found["reward_difference"][0] == pytest.approx(means[1] - means[0])
    assert found["reward_before"][1] <= means[0] <= found["reward_before"][2] and found["heldout_answers"] == 4
    shown = evaluation.side_by_side(whole, 6, 2)
    assert [row["question"] for row in shown] == [row["question"] for row in rows[0][:2]]
    assert [row["after"] for row in shown] == [row["answer"] for row in rows[1][:2]]
    assert evaluation.compare(whole, 5) == {} and evaluation.side_by_side(whole, 5, 2) == []


@pytest.mark.parametrize("micro_batch", [6, 12])
def test_a_run_that_died_goes_on_exactly(whole, tiny, sums, tmp_path, monkeypatch, micro_batch):
    """Killed while it scores step 4: from the checkpoint of step 2 the same numbers follow, also in other micro-batches."""
    keys = prepare(tmp_path, tiny, sums, **SETTINGS)
    score, batches = Reward.score, []

    def fail(self, answers, rows):
        batches.append(len(answers))
        if batches.count(12) == 4:
            raise KeyboardInterrupt
        return score(self, answers, rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Reward, "score", fail)
        embedded.train(keys, tmp_path, str(tiny))
    assert [step for step, _ in run_folder.checkpoints(tmp_path / "checkpoints")] == [2]
    assert [record["step"] for record in run_folder.read_records(tmp_path)[0]] == [1, 2, 3]
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    embedded.train({**keys, "micro_batch": micro_batch}, tmp_path, str(tiny), str(checkpoint))
    expected, found = (run_folder.read_records(folder) for folder in (whole, tmp_path))
    assert [record["reward"] for record in found[0]] == [record["reward"] for record in expected[0]]
    assert [record["val_reward"] for record in found[1]] == [record["val_reward"] for record in expected[1]]
    assert [record["tokens"] for record in found[0]] == [record["tokens"] for record in expected[0]]
    if micro_batch == 6:
        same(weights(tmp_path, 6), weights(whole, 6))
        assert [record["loss"] for record in found[0]] == [record["loss"] for record in expected[0]]


def test_several_updates_learn_from_one_rollout(tiny, sums, tmp_path, monkeypatch):
    """The loss of the second update by hand: its ratio is of the policy after the first to that which sampled."""
    from test_grpo_trainer import by_hand, likelihoods_of

    from nemo_ext.grpo.trainer import Trainer

    keys = prepare(tmp_path, tiny, sums, updates=2, steps=4, every=9, val_every=4, lr=5e-3, clip_low=0.05, clip_high=0.1, kl=0.05,
                   warmup=0)  # fmt: skip
    seen = []
    compute = Trainer._compute_loss

    def noted(self, model, inputs):
        loss = compute(self, model, inputs)
        with torch.no_grad():
            seen.append((loss.item(), {k: v.clone() for k, v in inputs.items()}, likelihoods_of(self, inputs)))
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_compute_loss", noted)
        embedded.train(keys, tmp_path, str(tiny))
    assert len(seen) == 4
    for first, second in ((seen[0], seen[1]), (seen[2], seen[3])):
        assert torch.equal(first[1]["completion_ids"], second[1]["completion_ids"])
        assert torch.equal(first[1]["old_per_token_logps"], second[1]["old_per_token_logps"])
        torch.testing.assert_close(first[2], first[1]["old_per_token_logps"], rtol=1e-4, atol=1e-5)  # as it was sampled
        assert (second[2] - second[1]["old_per_token_logps"]).abs().max() > 0.06  # and no more
        for loss, inputs, new in (first, second):
            expected = by_hand(
                "token", new, inputs["old_per_token_logps"], inputs["ref_per_token_logps"], inputs, 0.05, 0.1, 0.05, 6
            )
            assert loss == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    assert not torch.equal(seen[1][1]["prompt_ids"], seen[2][1]["prompt_ids"])
    steps, _ = run_folder.read_records(tmp_path)
    assert [record["reward"] for record in steps[::2]] == [record["reward"] for record in steps[1::2]]
    assert steps[0]["clipped"] == 0 < steps[1]["clipped"] and steps[1]["generation_time"] == 0 < steps[0]["generation_time"]


@pytest.mark.parametrize("micro_batch", [6, 4])
def test_a_run_goes_on_between_two_updates(tiny, sums, tmp_path, micro_batch):
    """From a checkpoint after the first of three updates, which holds the answers; in other micro-batches the same problems."""
    settings = dict(SETTINGS, updates=3, steps=6, every=1, keep=9)
    for name in ("whole", "again"):
        keys = prepare(tmp_path / name, tiny, sums, **settings)
    embedded.train(keys, tmp_path / "whole", str(tiny))
    shutil.copytree(tmp_path / "whole/checkpoints/step-000004", tmp_path / "again/checkpoints/step-000004")
    embedded.train(
        keys | {"micro_batch": micro_batch}, tmp_path / "again", str(tiny), str(tmp_path / "again/checkpoints/step-000004")
    )
    expected, found = (run_folder.read_records(tmp_path / name)[0] for name in ("whole", "again"))
    assert [record["reward"] for record in found] == [record["reward"] for record in expected[4:]]
    if micro_batch == 6:
        same(weights(tmp_path / "again", 6), weights(tmp_path / "whole", 6))
    else:
        assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected[4:]], rel=1e-3, abs=1e-5)
    held = [file.parent.name for file in sorted((tmp_path / "whole/checkpoints").glob("*/rollout.pt"))]
    assert held == [f"step-00000{step}" for step in (1, 2, 4, 5)]


def test_a_watchdog_sees_how_far_it_comes(tiny, sums, tmp_path, monkeypatch):
    from nemo_ext.callbacks.watchdog import Watchdog

    places, come = [], Watchdog.come

    def noted(self, place, slow=False):
        assert slow  # sampling takes as long as its longest answer
        places.append((self.step, place))
        come(self, place, slow)

    keys = prepare(tmp_path, tiny, sums, **SETTINGS, steps=2, every=2, val_every=2, hang_timeout=300.0)
    monkeypatch.setattr(Watchdog, "come", noted)
    embedded.train(keys, tmp_path, str(tiny))
    assert places[0] == (0, "loading") and {(0, "evaluating"), (0, "generation"), (2, "saving")} <= set(places)
    for step in (1, 2):
        assert [place for at, place in places if at == step][:4] == ["generation", "scoring", "training", "training"]
    assert list((tmp_path / "logs").glob("*.stacks")) == []  # it looks away at the end


def test_a_signal_ends_it_saved_after_the_step(whole, tiny, sums, tmp_path, monkeypatch):
    keys = prepare(tmp_path, tiny, sums, **SETTINGS)
    score, batches = Reward.score, []

    def signalled(self, answers, rows):
        batches.append(len(answers))
        if batches.count(12) == 3:
            signal.raise_signal(signal.SIGTERM)
        return score(self, answers, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Reward, "score", signalled)
        embedded.train(keys, tmp_path, str(tiny))
    status = run_folder.read_status(tmp_path)
    assert (status["phase"], status["signal"]) == ("stopped", "SIGTERM")
    assert run_folder.newest_checkpoint(tmp_path / "checkpoints")[0] == 3
    embedded.train(keys, tmp_path, str(tiny), str(tmp_path / "checkpoints" / "step-000003"))
    same(weights(tmp_path, 6), weights(whole, 6))


def test_what_was_trained_loads(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = whole / "checkpoints" / "step-000006"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1 ="}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|assistant|>") and loaded.config.num_hidden_layers == 2


def test_a_loss_that_is_no_number_ends_it(tiny, sums, tmp_path):
    """A learning rate that destroys the model: one line, and no checkpoint of it."""
    keys = prepare(tmp_path, tiny, sums, lr=1e30, clip=0.0, every=6)
    with pytest.raises(RunError, match=r"(the loss|the gradient norm) is (nan|inf) at step \d"):
        embedded.train(keys, tmp_path, str(tiny))
    assert run_folder.checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(
    ("on_nan", "counted"), [("skip", {"skipped_steps": 1}), ("rollback", {"rollbacks": 1, "rolled_back": 1})]
)
def test_a_step_that_is_no_number_is_kept_out(whole, tiny, sums, tmp_path, monkeypatch, on_nan, counted):
    """The fourth step's loss: weights and Adam's states are those of step 3, or of the checkpoint, and the schedule goes on."""
    from nemo_ext.grpo.trainer import Trainer

    keys = prepare(tmp_path, tiny, sums, **SETTINGS, on_nan=on_nan, every=1 if on_nan == "skip" else 3, keep=6)
    compute_loss = Trainer.compute_loss

    def broken(self, *arguments, **named):
        return compute_loss(self, *arguments, **named) * (float("nan") if self.state.global_step == 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "compute_loss", broken)
        embedded.train(keys, tmp_path, str(tiny))
    assert faults.counts(tmp_path) == counted
    steps, expected = (run_folder.read_records(folder)[0] for folder in (tmp_path, whole))
    assert [record["lr"] for record in steps] == [record["lr"] for record in expected]
    assert [record["loss"] for record in steps[:3]] == [record["loss"] for record in expected[:3]]
    assert steps[3]["loss"] is None and steps[3]["skipped"] is True and steps[3]["reward"] == expected[3]["reward"]
    assert all(isinstance(record["loss"], float) and "skipped" not in record for record in steps[4:])
    if on_nan == "skip":
        same(weights(tmp_path, 4), weights(tmp_path, 3))
        moments = [torch.load(tmp_path / f"checkpoints/step-00000{step}/optimizer.pt")["state"] for step in (3, 4)]
        same(*({(i, name): value for i, state in each.items() for name, value in state.items()} for each in moments))
        after, before = weights(tmp_path, 5), weights(tmp_path, 4)
        assert any(not torch.equal(after[name], before[name]) for name in before)


def test_weights_that_are_broken_go_back_to_the_checkpoint(whole, tiny, sums, tmp_path, monkeypatch):
    """Which leaving out a step would not heal: after step 4 the run is where step 3 left it."""
    from nemo_ext.grpo.trainer import Trainer

    keys = prepare(tmp_path, tiny, sums, **SETTINGS, on_nan="rollback", every=1, keep=6)
    step = Trainer.training_step

    def broken(self, model, *rest, **named):
        if self.state.global_step == 3:
            next(model.parameters()).data.view(-1)[0] = float("nan")
        return step(self, model, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", broken)
        embedded.train(keys, tmp_path, str(tiny))
    same(weights(tmp_path, 4), weights(tmp_path, 3))
    assert faults.counts(tmp_path) == {"rollbacks": 1, "rolled_back": 1}
    assert all(isinstance(record["loss"], float) for record in run_folder.read_records(tmp_path)[0][4:])


def test_failures_of_a_reward_are_counted(tiny, sums, tmp_path):
    """A reward that raises for some answers: they count 0, the run goes on."""
    lines = ["def reward(answers, rows):", "    if rows[0]['level'] == 1:", "        raise ValueError('no')",
             "    return [1.0] * len(answers)"]  # fmt: skip
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    keys = prepare(tmp_path, tiny, sums, reward=f"{tmp_path}/mine.py:reward", steps=2, val_every=2, warmup=0)
    embedded.train(keys, tmp_path, str(tiny))
    steps, _ = run_folder.read_records(tmp_path)
    assert sum(record["reward_failures"] for record in steps) > 0
    assert all(record["equal_groups"] == 1.0 and record["loss"] == 0.0 for record in steps)


def test_keys_of_the_sandbox_and_the_judge_reach_the_rewards(monkeypatch):
    """A program that needs 200 MiB passes with the default and not with less; the judge's key comes from the variable named."""
    rows = [{"question": "?", "answer": "", "tests": ["assert len(text) > 1"]}]
    answer = "```python\ntext = 'a' * (200 << 20)\n```"
    for memory, value in ((512, 1.0), (100, 0.0)):
        with embedded.build_reward(keys(reward="code", sandbox_memory=memory)) as reward:
            assert reward([answer], rows) == [value]
    judge = dict(reward="judge", judge_url="http://127.0.0.1:9/v1", judge_model="m", judge_key_env="A_JUDGES_KEY")
    with pytest.raises(UserError, match="judge_key_env=A_JUDGES_KEY: the environment has no such variable"):
        embedded.build_reward(keys(**judge))
    monkeypatch.setenv("A_JUDGES_KEY", "secret")
    assert "secret" not in str(keys(**judge)) and embedded.build_reward(keys(**judge)).weights == {"judge": 1.0}


def test_problems_that_are_always_or_never_solved_are_dropped(tiny, sums, tmp_path, monkeypatch):
    keys = prepare(tmp_path, tiny, sums, filter_samples=6, max_answer=20)
    rows = embedded.read_rows(tmp_path / embedded.TRAIN)

    def by_level(self, answers, rows):
        return [{0: 1.0, 1: 0.0, 2: float(len(a) % 2)}[row["level"]] for a, row in zip(answers, rows, strict=True)]

    monkeypatch.setattr(Reward, "__call__", by_level)
    seen = []
    kept = difficulty.without_extremes(Problems(rows, []), keys | {"reward": "length:1"}, tiny, lambda *of: seen.append(of))
    always, never = (sum(row["level"] == level for row in rows) for level in (0, 1))
    assert {row["level"] for row in kept.train} == {2}
    assert kept.left_out["that the model always solves"] >= always and kept.left_out["that the model never solves"] >= never
    assert seen[-1] == (len(rows), len(rows))
