"""TRL's GRPOTrainer, with what it does otherwise than our keys say, or not at all.

Changed, each in the one method that TRL has for it (TRL 1.16.0):

`_get_train_sampler`             problems in an order that a resumed run finds again, across passes
`_tokenize_prompts`              prompts are token ids already
`_generate_single_turn`          `sampling.sample`, which reads a prompt once for its group; vLLM stays TRL's
`rollout_func`                   set where there are tools: `Conversations`, as TRL's own tools need transformers 5
`_calculate_rewards`             our rewards, which see the whole record
`_generate_and_score_completions`  advantages by our keys (leave-one-out among them), and dynamic sampling
`_get_per_token_logps_and_entropies`  a prompt is read once for all its answers in training too
`_prepare_inputs`                an answer that several updates learn from is in the checkpoints between them
`create_scheduler`, `_save_checkpoint`  the schedule and the checkpoints of our other runs

Loss, clipping, KL and the mask of truncated answers are TRL's own. Import after `nemo_ext.platform.activate()`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import DynamicCache
from trl import GRPOTrainer
from trl.trainer.utils import pad, split_tensor_dict

from nemo_ext import run_folder
from nemo_ext.data.chat.render import Renderer
from nemo_ext.disk import sync, sync_tree
from nemo_ext.errors import RunError
from nemo_ext.grpo.advantages import advantages, equal_groups, problem_order, spare_problems
from nemo_ext.grpo.conversation import Answer, Conversations, with_turns
from nemo_ext.grpo.sampling import sample
from nemo_ext.grpo.tools import Tools
from nemo_ext.rewards import Reward
from nemo_ext.schedule import schedule_factor

ROLLOUT = "rollout.pt"  # in a checkpoint: the answers that further updates learn from
LEFT = ("prompt_ids", "prompt_mask")  # padded on the left; what else is a matrix, on the right


class Trainer(GRPOTrainer):
    """`rows` are problems of `nemo_ext.grpo.data`, `keys` those of a GRPO recipe with every choice made; `tools` are started, and
    `renderer` has the chat template that shows their results."""

    def __init__(
        self,
        keys: dict[str, Any],
        rows: Sequence[dict[str, Any]],
        reward: Reward,
        tools: Tools | None = None,
        renderer: Renderer | None = None,
        **trl: Any,
    ) -> None:
        self.keys, self.rows, self.reward = keys, rows, reward
        self.spent = {"generation": 0.0, "scoring": 0.0}  # seconds in the running step
        if tools:
            self.spent["tools"] = 0.0
        self.figures: dict[str, Any] = {}  # of the running step's answers
        self.sampled: dict[str, Any] = {}  # of the last rollout's
        self.lost = False  # the running step has a loss that is no number
        self.come: Callable[[str], None] = lambda place: None  # called with what this process begins to do
        super().__init__(
            reward_funcs=[_reward], train_dataset=Dataset.from_dict({"prompt": list(map(str, range(len(rows))))}), **trl
        )
        self.conversations = Conversations(
            self._tokenizer, keys["max_answer"], self.eos_token_ids, keys["turns"], tools, renderer, lambda: self._timed("tools")
        )
        if tools:
            self.rollout_func = self._rollout
        for model in (self.model, self.ref_model):
            if model is not None and model.base_model is model:  # Gemma 3's text model names another part than it has
                model.base_model_prefix = "model"

    # Problems

    def _get_train_sampler(self, dataset: Dataset | None = None) -> list[int]:
        """Places of problems: each rollout's, `group` times in a row, and its batch once for each backward pass of updates."""
        keys = self.keys
        rollouts = -(-keys["steps"] // keys["updates"])
        order = problem_order(len(self.rows), rollouts * keys["prompts"], keys["seed"])
        batches = (order[begin : begin + keys["prompts"]] for begin in range(0, len(order), keys["prompts"]))
        return [
            place
            for batch in batches
            for _ in range(self.args.steps_per_generation * keys["updates"])
            for place in batch
            for _ in range(keys["group"])
        ]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return [self.rows[int(prompt)]["ids"] for prompt in prompts], None, {}

    # Answers

    def answers(self, rows: Sequence[dict[str, Any]], seed: int, batch: int) -> Iterator[list[Answer]]:
        """One answer to each of `rows` by the present weights, `batch` at a time."""
        for begin in range(0, len(rows), batch):
            torch.manual_seed(seed + begin)
            yield self.conversations.answers([row["ids"] for row in rows[begin : begin + batch]], 1, self._turn)

    def _rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """The answers of a step, of several turns, as TRL's `rollout_func` gives them."""
        ids = self._tokenize_prompts(prompts)[0]
        self._answers = self.conversations.answers(ids, self.num_generations, self._turn)
        return {
            "prompt_ids": ids,
            "completion_ids": [answer.ids for answer in self._answers],
            "logprobs": [answer.log_probs for answer in self._answers] if self.use_vllm else None,
            "env_mask": [answer.own for answer in self._answers],
        }

    def _turn(self, prompts: list[list[int]], group: int, limit: int):
        """A turn of at most `limit` tokens for each prompt, `group` of which in a row are the same."""
        return self._generate_single_turn(prompts, None, {}, group, limit=limit)

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False, limit: int | None = None
    ):
        with self._timed("generation"):
            if self.use_vllm:
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
            model = self.accelerator.unwrap_model(self.model)
            training = model.training
            model.eval()
            try:
                with self.accelerator.autocast():
                    found = sample(
                        model, prompt_ids[::num_generations], num_generations, max_answer=limit or self.max_completion_length,
                        temperature=self.temperature, top_p=self.top_p, ends=self.eos_token_ids, pad=self._tokenizer.pad_token_id,
                    )  # fmt: skip
            finally:
                model.train(training)
            return found, None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        """float [answers, 1]."""
        rows = [self.rows[int(prompt)] for prompt in prompts]
        if self.conversations.tools:
            completions = [answer.text for answer in self._answers]
            rows = with_turns(rows, self._answers)
            self._heard += self._answers
        with self._timed("scoring"):
            scores = self.reward.score(completions, rows)
        self._scores.append(scores)
        self._sampled += completion_ids_list
        if scores.message and not self._complained:
            print(f"a reward failed and counts as 0: {scores.message}", flush=True)
            self._complained = True
        return torch.tensor(scores.total, dtype=torch.float32, device=self.accelerator.device)[:, None]

    _complained = _warned = False

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout with our advantages; with dynamic sampling, of groups whose rewards are not all equal."""
        keys, step = self.keys, self.state.global_step + 1
        self._scores, self._sampled, self._heard = [], [], []
        batches = [super()._generate_and_score_completions(inputs)]
        while keys["dynamic_sampling"] and (short := keys["prompts"] - int((~equal_groups(self._rewards())).sum())) > 0:
            if len(batches) == keys["dynamic_limit"]:
                raise RunError(
                    f"dynamic_sampling: step {step} lacks {short} of prompts={keys['prompts']} groups with unequal rewards after "
                    f"{len(batches)} batches: raise dynamic_limit=, or drop too easy and too hard problems with filter=true"
                )
            batches.append(super()._generate_and_score_completions(self._more(inputs, len(batches), step)))
        rewards = self._rewards()
        self._note(batches, rewards)
        batch = _joined(batches, self._tokenizer.pad_token_id) if len(batches) > 1 else batches[0]
        batch["advantages"] = advantages(rewards, keys["normalize"], keys["leave_one_out"]).flatten()
        if len(batches) > 1:
            chosen = (~equal_groups(rewards)).nonzero()[: keys["prompts"], 0]
            places = (chosen[:, None] * keys["group"] + torch.arange(keys["group"], device=chosen.device)).flatten()
            batch = {name: value[places] if value.ndim else value for name, value in batch.items()}
            batch["num_items_in_batch"] = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum()
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training and self._buffered_inputs is None and self._kept is not None:
            parts, self._kept = self._kept, None
            whole = {
                name: value if value.ndim == 0 else torch.cat([part[name] for part in parts]) for name, value in parts[0].items()
            }
            device = self.accelerator.device
            self._buffered_inputs = split_tensor_dict(
                {name: value.to(device) for name, value in whole.items()}, self.args.steps_per_generation
            )
        return super()._prepare_inputs(generation_batch)

    def _rewards(self) -> torch.Tensor:
        """Of all answers of this step so far, float [problems, group]."""
        values = [value for scores in self._scores for value in scores.total]
        return torch.tensor(values, dtype=torch.float32, device=self.accelerator.device).view(-1, self.keys["group"])

    def _more(self, inputs: list[dict[str, Any]], number: int, step: int) -> list[dict[str, Any]]:
        """Other problems for batch `number` of a step."""
        prompts, group = self.keys["prompts"], self.keys["group"]
        used = {int(row["prompt"]) for row in inputs}
        spare = [place for place in spare_problems(len(self.rows), self.keys["seed"], step) if place not in used]
        chosen = spare[(number - 1) * prompts : number * prompts]
        if len(chosen) < prompts:
            raise RunError(f"dynamic_sampling: step {step} has tried all {len(self.rows):,} problems: give more of them")
        return [{"prompt": str(place)} for place in chosen for _ in range(group)]

    def _note(self, batches: list[dict[str, Any]], rewards: torch.Tensor) -> None:
        """Figures of a step's answers, all that were sampled."""
        parts = {name: [v for scores in self._scores for v in scores.parts[name]] for name in self._scores[0].parts}
        lengths = [len(ids) for ids in self._sampled]
        self.sampled = {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "equal_groups": float(equal_groups(rewards).float().mean()),
            "reward_failures": sum(scores.failures for scores in self._scores),
            "length": sum(lengths) / len(lengths),
            "cut_off": sum(ids[-1] not in self.eos_token_ids for ids in self._sampled) / len(lengths),
            "tokens": sum(lengths) + sum(int(batch["prompt_mask"].sum()) for batch in batches),
        }
        if len(parts) > 1:
            self.sampled |= {f"reward/{name}": sum(values) / len(values) for name, values in parts.items()}
        if self.keys["dynamic_sampling"]:
            self.sampled["batches"] = len(batches)
        if heard := self._heard:
            self.sampled |= {
                "length": sum(answer.length for answer in heard) / len(heard),
                "turns": sum(answer.turns for answer in heard) / len(heard),
                "tool_calls": sum(answer.calls for answer in heard) / len(heard),
                "tool_failures": sum(answer.failures for answer in heard),
            }
            failure = next((answer.failure for answer in heard if answer.failure), None)
            if failure and not self._warned:
                print(f"a call of a tool failed, which the model is told: {failure[:300]}", flush=True)
                self._warned = True
        self.figures = dict(self.sampled)

    # Likelihoods

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **more,
    ):
        """As TRL's, but each distinct prompt of a batch goes through the model once: its keys and values serve all its answers.

        Gradients flow through them: the result is that of whole rows, but for rounding. Not with gradient checkpointing, which
        keeps no keys and values, nor where a mixture of experts balances its loads over all tokens.
        """
        width = input_ids.size(1) - logits_to_keep
        if width < 2 or compute_aux_loss or self.args.gradient_checkpointing or any(v is not None for v in more.values()):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, **more
            )
        batch_size = batch_size or len(input_ids)
        found = [
            self._of_shared_prompts(model, input_ids[i : i + batch_size], attention_mask[i : i + batch_size], width)
            for i in range(0, len(input_ids), batch_size)
        ]
        log_probs, entropies = (torch.cat(each) for each in zip(*found, strict=True)) if compute_entropy else (
            torch.cat([log_prob for log_prob, _ in found]), None)  # fmt: skip
        return log_probs, entropies, None

    def _of_shared_prompts(self, model, ids: torch.Tensor, mask: torch.Tensor, width: int):
        """Log-probabilities and entropies (None where the model's head gives none), [answers, tokens], of ids [answers, width +
        tokens]. All but a prompt's last token are read once; that one and the answer are read for each answer."""
        shared = torch.cat([ids[:, : width - 1], mask[:, : width - 1]], dim=1)
        distinct, owner = torch.unique(shared, dim=0, return_inverse=True)
        prompt_ids, prompt_mask = distinct.split(width - 1, dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        answers, known = ids[:, width:], mask[:, width:]
        inner = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            cache = DynamicCache(config=inner.config)
            prompt_positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
            inner.base_model(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                position_ids=prompt_positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache.batch_select_indices(owner)
            output = model(
                input_ids=ids[:, width - 1 : -1], attention_mask=mask[:, :-1], position_ids=positions[:, width - 1 : -1],
                past_key_values=cache, shift_labels=answers.masked_fill(known == 0, -100), fused_lm_head=True,
            )  # fmt: skip
        return output.log_probs, output.entropy

    # Steps

    def _inner_training_loop(self, batch_size: int | None = None, *rest: Any, **named: Any):
        return super()._inner_training_loop(self.args.train_batch_size, *rest, **named)  # of this start, not of the checkpoint's

    def go_on(self, checkpoint: Path) -> None:
        """Continue from a checkpoint between two updates of a rollout with its answers."""
        self._step = int(checkpoint.name.removeprefix("step-")) * self.args.gradient_accumulation_steps
        if (file := checkpoint / ROLLOUT).is_file():
            kept = torch.load(file, map_location="cpu", weights_only=True)
            self._kept, self.sampled = kept["answers"], kept["figures"]

    _kept: list[dict[str, torch.Tensor]] | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        keys = self.keys

        def factor(step: int) -> float:
            return schedule_factor(
                step, schedule=keys["schedule"], max_steps=keys["steps"], warmup_steps=keys["warmup"],
                floor=keys["min_lr"] / keys["lr"], decay_fraction=0.0,
            )  # fmt: skip

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, *arguments: Any, **named: Any):
        self.come("training")  # what was sampled is there
        return super().compute_loss(*arguments, **named)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if torch.isfinite(loss):
            return loss
        if self.keys["on_nan"] == "stop":
            raise RunError(f"the loss is {float(loss)} at step {self.state.global_step + 1}: lower lr=, or raise warmup=")
        self.lost = True
        return torch.zeros_like(loss)  # of the mean that is logged, which would be no number for ever

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Weights in Hugging Face's format, optimizer, schedule, random numbers and place: whole under its name, or not there."""
        final = Path(self.args.output_dir) / f"step-{self.state.global_step:06d}"
        if final.exists():
            return
        partial = final.with_name(final.name + run_folder.PARTIAL)
        self.save_model(str(partial), _internal_call=True)
        self._save_optimizer_and_scheduler(str(partial))
        self._save_rng_state(str(partial))
        if self.state.global_step % self.keys["updates"]:
            torch.save({"answers": self._buffered_inputs, "figures": self.sampled}, partial / ROLLOUT)
        self.state.log_history = []  # metrics.jsonl has it
        self.state.save_to_json(str(partial / "trainer_state.json"))
        run_folder.write_manifest(partial)
        sync_tree(partial)
        partial.rename(final)
        sync(final.parent)
        for _, old in run_folder.checkpoints(final.parent)[: -self.keys["keep"]]:
            run_folder.remove_checkpoint(old)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        self.come(what)
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - started


def _reward(**given: Any) -> list[float]:
    """Stands where TRL expects a reward: `Trainer._calculate_rewards` takes its place."""
    raise AssertionError("TRL scores answers itself: its _calculate_rewards is not the one that this module replaces")


def _joined(batches: Sequence[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
    """Batches of TRL's rollouts as one, padded to the longest prompt and answer."""
    joined = {}
    for name, first in batches[0].items():
        values = [batch[name] for batch in batches]
        if first.ndim == 2:
            side, value = ("left" if name in LEFT else "right"), (pad_id if name.endswith("_ids") else 0)
            joined[name] = pad([row for each in values for row in each], padding_value=value, padding_side=side)
        else:
            joined[name] = torch.cat(values) if first.ndim else first
    return joined
