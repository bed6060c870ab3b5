"""The embedded engine's arithmetic: likelihoods with shared prompts, losses by hand, dynamic sampling."""

import pytest
import torch
from grpo_models import keys, prepare, write_model

from nemo_ext.errors import RunError
from nemo_ext.grpo import settings
from nemo_ext.grpo.advantages import advantages
from nemo_ext.rewards import Scores

ENDS, PAD = 0, 1


class Fixed:
    """A reward that gives `value(answer, row)`."""

    def __init__(self, value):
        self.value, self.asked = value, []

    def score(self, answers, rows):
        self.asked.append([row["question"] for row in rows])
        values = [float(self.value(answer, row)) for answer, row in zip(answers, rows, strict=True)]
        return Scores(values, {"fixed": values})


def trainer_of(folder, model, sums, reward=None, with_tools=None, **given):
    from nemo_ext import platform

    platform.activate()
    from transformers import AutoTokenizer
    from trl import GRPOConfig

    from nemo_ext.data.chat.render import Renderer, Settings
    from nemo_ext.grpo.embedded import TRAIN, read_rows
    from nemo_ext.grpo.trainer import Trainer

    chosen = prepare(folder, model, sums, loaded=dict(tools=with_tools), **given)
    arguments = settings.trl_arguments(chosen, str(folder / "checkpoints"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    return Trainer(
        chosen, read_rows(folder / TRAIN), reward or Fixed(lambda answer, row: len(answer)), with_tools,
        Renderer(model, Settings(1)), model=str(model), args=GRPOConfig(**arguments), processing_class=tokenizer,
    )  # fmt: skip


def batch(seed=0, rows=6, width=7, tokens=5):
    """Prompts of which rows 0, 2, 4 and 1, 3, 5 share one, answers of different lengths, and made-up old and reference values."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(5, 90, (2, width), generator=g)
    mask = torch.ones_like(prompt)
    prompt[0, :3], mask[0, :3] = PAD, 0
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])
    answers = torch.randint(5, 90, (rows, tokens), generator=g)
    known = (torch.arange(tokens)[None] < lengths[:, None]).long()
    share = torch.arange(rows) % 2
    found = {
        "prompt_ids": prompt[share],
        "prompt_mask": mask[share],
        "completion_ids": answers.masked_fill(known == 0, PAD),
        "completion_mask": known,
        "advantages": torch.tensor([1.0, -0.5, 0.25, 0.0, -1.0, 0.75]),
        "num_items_in_batch": known.sum(),
    }
    return found


def likelihoods(trainer, inputs, own: bool):
    """Log-probabilities, entropies and the gradient of a weighted sum of the former, by our method or TRL's."""
    from trl import GRPOTrainer

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    method = type(trainer) if own else GRPOTrainer
    trainer.model.zero_grad()
    log_probs, entropies, _ = method._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, inputs["completion_ids"].size(1), batch_size=4, compute_entropy=True
    )
    known = inputs["completion_mask"]
    (log_probs * known * inputs["advantages"][:, None]).sum().backward()
    return log_probs.detach() * known, entropies.detach() * known, [p.grad.clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3"])
def test_shared_prompts_give_the_likelihoods_and_gradients_of_whole_rows(family, tiny, tmp_path, sums):
    trainer = trainer_of(tmp_path, write_model(tmp_path / "model", family), sums)
    found, expected = (likelihoods(trainer, batch(), own) for own in (True, False))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def by_hand(loss, new, old, reference, inputs, low, high, kl, longest):
    """The loss over a step's answers from log-probabilities [answers, tokens], in plain loops."""
    sums, lengths = [], []
    for row, advantage in enumerate(inputs["advantages"].tolist()):
        total, length = 0.0, 0
        for place in range(new.size(1)):
            if inputs["completion_mask"][row, place]:
                ratio = torch.exp(new[row, place] - old[row, place])
                clipped = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
                gap = reference[row, place] - new[row, place]
                total = total - min(ratio * advantage, clipped * advantage) + kl * (torch.exp(gap) - gap - 1)
                length += 1
        sums.append(total)
        lengths.append(length)
    if loss == "token":
        return sum(sums) / sum(lengths)
    if loss == "sequence":
        return sum(total / length for total, length in zip(sums, lengths, strict=True)) / len(sums)
    return sum(sums) / (len(sums) * longest)


@pytest.mark.parametrize("loss", ["token", "sequence", "dr_grpo"])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_losses_by_hand(loss, kl, tiny, tmp_path, sums):
    """Ratios on both sides of both clips, KL, and answers of different lengths; micro-batches add up to the whole."""
    trainer = trainer_of(
        tmp_path, tiny, sums, prompts=3, group=2, micro_batch=6, loss=loss, kl=kl, clip_low=0.1, clip_high=0.3, max_answer=9
    )
    inputs = batch()
    new = with_noise(trainer, inputs)
    expected = by_hand(loss, new, inputs["old_per_token_logps"], inputs["ref_per_token_logps"], inputs, 0.1, 0.3, kl, 9)
    torch.testing.assert_close(trainer._compute_loss(trainer.model, inputs).detach(), expected, rtol=1e-4, atol=1e-6)

    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps = trainer.args.steps_per_generation = 3
    halves = [{k: v[i : i + 2] if v.ndim else v for k, v in inputs.items()} for i in (0, 2, 4)]
    together = sum(trainer._compute_loss(trainer.model, half).detach() for half in halves)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)


def with_noise(trainer, inputs):
    """Give `inputs` likelihoods of an older policy and of the reference, off from the present ones, which are returned."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        new = likelihoods_of(trainer, inputs)
    noise = torch.Generator().manual_seed(5)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = new + torch.randn(new.shape, generator=noise) * 0.4
    return new


def likelihoods_of(trainer, inputs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].size(1))[0]


def rollout(trainer, places):
    inputs = [{"prompt": str(place)} for place in places for _ in range(trainer.keys["group"])]
    torch.manual_seed(0)
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs)


def test_a_rollout_has_our_advantages_and_figures(tiny, tmp_path, sums):
    reward = Fixed(lambda answer, row: 3.0 if row["level"] == 0 else len(answer))
    trainer = trainer_of(tmp_path, tiny, sums, reward, leave_one_out=True, normalize=False)
    easy = next(i for i, row in enumerate(trainer.rows) if row["level"] == 0)
    others = [i for i, row in enumerate(trainer.rows) if row["level"]][:2]
    found = rollout(trainer, [easy, *others])
    rewards = trainer._rewards()
    assert rewards.shape == (3, 4) and rewards[0].tolist() == [3.0] * 4
    torch.testing.assert_close(found["advantages"], advantages(rewards, False, True).flatten())
    assert trainer.figures["equal_groups"] == pytest.approx(1 / 3)
    assert trainer.figures["reward"] == pytest.approx(rewards.mean().item())
    lengths = [len(ids) for ids in trainer._sampled]
    assert trainer.figures["length"] == sum(lengths) / 12 and int(found["completion_mask"].sum()) == sum(lengths)
    assert trainer.figures["tokens"] == sum(lengths) + int(found["prompt_mask"].sum())


def test_cut_off_answers_teach_nothing_with_overlong_filter(tiny, tmp_path, sums):
    trainer = trainer_of(tmp_path, tiny, sums, overlong_filter=True, max_answer=30)
    found = rollout(trainer, [0, 1, 2])
    cut = [ids[-1] != ENDS for ids in trainer._sampled]
    assert 0 < sum(cut) < 12 and trainer.figures["cut_off"] == sum(cut) / 12
    assert [not row.any() for row in found["completion_mask"]] == cut
    assert int(found["num_items_in_batch"]) == sum(len(ids) for ids, c in zip(trainer._sampled, cut, strict=True) if not c)


def test_dynamic_sampling_fills_the_step_with_unequal_groups(tiny, tmp_path, sums):
    reward = Fixed(lambda answer, row: 1.0 if row["level"] else len(answer))
    trainer = trainer_of(tmp_path, tiny, sums, reward, dynamic_sampling=True, dynamic_limit=8, kl=0.1)
    found = rollout(trainer, [i for i, row in enumerate(trainer.rows) if row["level"]][:3])
    assert found["advantages"].view(3, 4).abs().sum(1).min() > 0
    assert {len(value) for value in found.values() if value.ndim} == {12}
    assert int(found["num_items_in_batch"]) == int(found["completion_mask"].sum())
    assert trainer.figures["batches"] == len(reward.asked) > 1
    asked = [set(batch) for batch in reward.asked]
    assert not asked[0] & asked[1]  # other problems
    texts = {"".join(trainer._tokenizer.convert_ids_to_tokens(row)) for row in found["prompt_ids"]}
    chosen = [row for row in trainer.rows if any(row["question"] in text for text in texts)]
    assert len(chosen) == 3 and all(row["level"] == 0 for row in chosen)
    log_probs = likelihoods_of(trainer, found)
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer._compute_loss(trainer.model, {**found, "old_per_token_logps": log_probs.detach()}))


def test_dynamic_sampling_ends(tiny, tmp_path, sums):
    trainer = trainer_of(tmp_path, tiny, sums, Fixed(lambda answer, row: 1.0), dynamic_sampling=True, dynamic_limit=2)
    with pytest.raises(RunError, match=r"step 1 lacks 3 of prompts=3 groups with unequal rewards after 2 batches: raise"):
        rollout(trainer, [0, 1, 2])


def test_the_schedule_ends_at_min_lr(tiny, tmp_path, sums):
    trainer = trainer_of(tmp_path, tiny, sums, lr=1e-3, min_lr=1e-4, schedule="linear", warmup=2, steps=6)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = trainer.create_scheduler(6, optimizer)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 7e-4, 4e-4, 1e-4])


def test_what_trl_is_told():
    """Every key that changes what is learnt, in TRL's words."""
    chosen = keys(loss="sequence", normalize=False, kl=0.2, clip_low=0.1, clip_high=0.28, overlong_filter=True, clip=0.0,
                  top_p=0.9, micro_batch=4, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-6, temperature=0.7)  # fmt: skip
    found = settings.trl_arguments(chosen, "out")
    expected = dict(
        loss_type="grpo", scale_rewards="none", beta=0.2, epsilon=0.1, epsilon_high=0.28, mask_truncated_completions=True,
        max_grad_norm=float("inf"), top_p=0.9, top_k=0, temperature=0.7, num_generations=4, max_completion_length=6,
        per_device_train_batch_size=4, gradient_accumulation_steps=3, steps_per_generation=3, num_iterations=1, max_steps=6,
        learning_rate=1e-3, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, bf16=False,
    )  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert {loss: settings.trl_arguments(keys(loss=loss), "")["loss_type"] for loss in settings.LOSSES} == {
        "token": "dapo", "sequence": "grpo", "dr_grpo": "dr_grpo",
    }  # fmt: skip
