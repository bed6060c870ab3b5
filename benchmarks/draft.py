"""What a draft model brings the embedded engine, with real weights: SmolLM2-135M, which has no smaller sibling, gets one.

    python benchmarks/draft.py [model=FOLDER] [layers=0,29] [seconds=80] [batch=64] [seq=256] [samples=4096]
                               [draft_tokens=2,4] [clients=1,4] [prompts=8] [max_tokens=48] [rounds=2] [dtype=float32]
                               [draft=FOLDER] [out=benchmarks/results/draft.json]

The draft is the model's own embedding, final norm and `layers`, distilled for `seconds` on the model's next-token distribution
(Kullback-Leibler divergence) over `batch` windows of `seq` tokens a step: python-docs, and `samples` texts that the model writes
itself, half of them questions and answers in its chat template, half continuations of python-docs. `draft` keeps it, and is taken
as it is if the folder is there.

Then one engine without a draft, one with prompt lookup and one for each of `draft_tokens` answer the same greedy requests, in
turns: continuations of held-out documents and answers to questions, each of `max_tokens` tokens. Reported are tokens a second,
the share of guesses that held, and tokens a step, beside what the file holds of other devices and dtypes. Exit code 1 if any
answer differs from that of the engine without a draft.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from benchmarks.prompts import QUESTIONS  # noqa: E402
from nemo_ext.platform import cpu_torch, hardware  # noqa: E402
from nemo_ext.run_folder import read_json, write_json  # noqa: E402

PROMPT = 64  # tokens of a document that are continued
PEAK, WARM_UP = 1e-3, 20  # learning rate, and steps to reach it
WARM = 16  # tokens of answers that are not counted
SMALL = {"batch": 4, "seq": 128, "samples": 16}  # on a CPU, where not given


@dataclass
class Measured:
    """An engine and what was measured of it by (task, clients)."""

    name: str
    engine: object
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    sums: dict[str, dict[str, float]] = field(default_factory=dict)

    def measure(self, task: str, prompts: list[tuple[int, ...]], clients: int, max_tokens: int) -> None:
        """One round: each client sends its next request when its last is answered."""
        before, started = self.engine.stats(), time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda prompt: answer(self.engine, prompt, max_tokens), prompts))
        seconds, after = time.perf_counter() - started, self.engine.stats()
        self.answers.setdefault(task, []).extend(found)
        sums = self.sums.setdefault(f"{task}, {clients}", {})
        for name, value in {
            "seconds": seconds,
            "tokens": sum(map(len, found)),
            "steps": after.steps - before.steps,
            "guessed": after.draft_tokens - before.draft_tokens,
            "accepted": after.accepted_tokens - before.accepted_tokens,
        }.items():
            sums[name] = sums.get(name, 0) + value

    def figures(self) -> dict[str, dict[str, float]]:
        """Sums of all rounds, and their ratios. A step of several clients gives each of them tokens."""
        return {
            label: sums | {"tokens_per_second": sums["tokens"] / sums["seconds"],
                           "tokens_per_step": sums["tokens"] / sums["steps"],
                           "acceptance": sums["accepted"] / sums["guessed"] if sums["guessed"] else None}
            for label, sums in self.sums.items()
        }  # fmt: skip


def answer(engine, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """The tokens of a greedy answer of full length."""
    from deploy.engine.request import Request, Sampling

    ids: list[int] = []
    ended, finishes = threading.Event(), []

    def take(output) -> None:
        ids.extend(output.ids)
        if output.finish:
            finishes.append(output.finish)
            ended.set()

    engine.submit(Request(prompt, max_tokens, Sampling(temperature=0), ignore_eos=True), take)
    ended.wait()
    if finishes != ["length"]:
        raise SystemExit(f"an answer ended by {finishes[0]}")
    return ids


def written(model, tokenizer, documents, samples: int) -> list:
    """Token ids [samples / 2, seq] that the model writes itself, at temperature 0.8: questions with answers, and continuations of
    `documents` [n, seq]."""
    import torch

    mark = "QUESTION"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False).split(mark)[0]
    beginning = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    chosen = torch.randint(len(documents), (samples - samples // 2,))
    model.generation_config.eos_token_id = None  # which ends a turn: the next one follows
    how = dict(max_length=documents.shape[1], do_sample=True, temperature=0.8, top_k=0, pad_token_id=0)
    starts = [ids.to(model.device) for ids in (beginning.expand(samples // 2, -1), documents[chosen, :PROMPT])]
    return [model.generate(ids, attention_mask=torch.ones_like(ids), **how).cpu() for ids in starts]


def distilled(
    folder: Path, tokenizer, documents, layers: list[int] | None, *, seconds: float, batch: int, samples: int, out: Path
) -> dict:
    """Make the draft and train it on windows [n, seq] of `documents` too; return what it is and how its loss fell."""
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import AutoModelForCausalLM

    device = "cuda" if hardware.has_cuda() else "cpu"
    torch.manual_seed(0)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval().to(device)
    draft = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = [0, draft.config.num_hidden_layers - 1] if layers is None else layers
    draft.model.layers = torch.nn.ModuleList([draft.model.layers[layer] for layer in chosen])
    for place, layer in enumerate(draft.model.layers):
        layer.self_attn.layer_idx = place
    draft.config.num_hidden_layers = len(chosen)
    draft.train().to(device)
    began = time.perf_counter()
    pools = [documents, *written(model, tokenizer, documents, samples)]
    wrote = time.perf_counter() - began
    print(f"{sum(map(len, pools[1:]))} texts written in {wrote:.1f} s; {len(documents)} windows of documents", flush=True)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0)
    losses, step, began = [], 0, time.perf_counter()
    while (passed := (time.perf_counter() - began) / seconds) < 1 or step < 2:
        ids = torch.cat([pool[torch.randint(len(pool), (batch // len(pools) + 1,))] for pool in pools])[:batch].to(device)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARM_UP, max(1 - passed, 0.01))
        with torch.no_grad():
            target = log_softmax(model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1), dim=-1)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = draft(input_ids=ids, use_cache=False).logits
        loss = kl_div(log_softmax(logits.float().flatten(0, 1), dim=-1), target, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}: KL {losses[-1]:.3f}", flush=True)
        step += 1
    print(f"step {step}: KL {losses[-1]:.3f}", flush=True)
    draft.save_pretrained(out)
    tokenizer.save_pretrained(out)
    several = min(20, step)
    return {
        "layers": chosen, "parameters": sum(weight.numel() for weight in draft.parameters()),
        "of_parameters": sum(weight.numel() for weight in model.parameters()), "writing_seconds": wrote,
        "training_seconds": time.perf_counter() - began, "steps": step, "tokens": step * ids.numel(),
        "kl_first": losses[0], "kl_last": sum(losses[-several:]) / several,
    }  # fmt: skip


def engines(folder: Path, draft: Path, draft_tokens: list[int], clients: list[int], dtype: str) -> list[Measured]:
    """What is compared, the engine without a draft first."""
    from deploy.engine.engine import Engine

    wanted = {"none": {}, "ngram": dict(draft="ngram")}
    wanted |= {f"model, {count} tokens": dict(draft=draft, draft_tokens=count) for count in draft_tokens}
    sizes = dict(rows=max(clients), context=512, dtype=dtype)
    return [Measured(name, Engine(folder, **sizes, **more)) for name, more in wanted.items()]


def main(arguments: list[str]) -> int:
    """Make the draft, measure, and write the figures."""
    given = dict(argument.split("=", 1) for argument in arguments)
    sizes = {"batch": 64, "seq": 256, "samples": 4096} if hardware.has_cuda() else SMALL
    batch, seq, samples = (int(given.pop(name, value)) for name, value in sizes.items())
    seconds, layers = float(given.pop("seconds", 80)), given.pop("layers", None)
    draft_tokens, clients = ([int(each) for each in given.pop(name, value).split(",")]
                             for name, value in (("draft_tokens", "2,4"), ("clients", "1,4")))  # fmt: skip
    count, max_tokens, rounds = (int(given.pop(name, value)) for name, value in
                                 (("prompts", 8), ("max_tokens", 48), ("rounds", 2)))  # fmt: skip
    dtype, out = given.pop("dtype", "float32"), Path(given.pop("out", ROOT / "benchmarks/results/draft.json"))
    kept, model = given.pop("draft", None), given.pop("model", None)
    if given:
        raise SystemExit(f"unknown: {', '.join(given)}\n\n{__doc__}")
    if not hardware.has_cuda():
        cpu_torch.declare_torchvision_ops()  # transformers imports torchvision
    import torch

    from conversion import gguf
    from conversion.quantization import texts
    from deploy.engine.prompts import load_tokenizer

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder, draft = Path(model or Path(temporary, "model")), Path(kept or Path(temporary, "draft"))
        if model is None:
            gguf.to_hf(gguf.smollm2_gguf(), folder)
        tokenizer, made = load_tokenizer(folder), None
        found = texts.windows(tokenizer, "python-docs", None, samples=10**6, heldout_samples=10**6, seq=seq, batch=1)
        heldout = found.heldout[:: max(1, len(found.heldout) // count)][:count, :PROMPT].tolist()
        if not draft.is_dir():
            chosen = [int(each) for each in layers.split(",")] if layers else None
            made = distilled(
                folder, tokenizer, found.calibration, chosen, seconds=seconds, batch=batch, samples=samples, out=draft
            )
            if hardware.has_cuda():
                torch.cuda.empty_cache()
        compared = engines(folder, draft, draft_tokens, clients, dtype)
        tasks = {
            "documents": [tuple(ids) for ids in heldout],
            "questions": [compared[0].engine.prompts.chat([{"role": "user", "content": text}]) for text in QUESTIONS[:count]],
        }
        for each in compared:  # the first steps of every shape are slow
            for task, asked in tasks.items():
                for number in clients:
                    Measured(each.name, each.engine).measure(task, asked[:number], number, WARM)
        for number in range(rounds):
            for task, asked in tasks.items():
                for each_clients in clients:
                    for each in compared[number % len(compared) :] + compared[: number % len(compared)]:
                        each.measure(task, asked, each_clients, max_tokens)
                        speed = each.figures()[f"{task}, {each_clients}"]
                        print(f"{task}, {each_clients} clients, {each.name}: {speed['tokens_per_second']:.1f} tokens/s, "
                              f"{speed['tokens_per_step']:.2f} a step", flush=True)  # fmt: skip
        for each in compared:
            each.engine.close()
    plain = compared[0]
    different = {
        each.name: sum(mine != own for task in tasks for mine, own in zip(each.answers[task], plain.answers[task], strict=True))
        for each in compared[1:]
    }
    figures = {each.name: each.figures() for each in compared}
    speed_up = {
        name: {label: found["tokens_per_second"] / figures["none"][label]["tokens_per_second"] for label, found in of.items()}
        for name, of in figures.items() if name != "none"
    }  # fmt: skip
    for name, of in speed_up.items():
        print(f"{name}: " + "; ".join(f"{label}: {ratio:.2f}" for label, ratio in of.items()), flush=True)
    answers = len(clients) * rounds * sum(map(len, tasks.values()))
    print(f"of {answers} answers each, others than without a draft: {different}", flush=True)
    device = torch.cuda.get_device_name(0) if hardware.has_cuda() else platform.processor() or platform.machine()
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"device": device, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
                    "load_before": load_before, "load_after": os.getloadavg()},
        "versions": machine.versions(("torch", "transformers")),
        "settings": {"dtype": dtype, "max_tokens": max_tokens, "rounds": rounds, "prompts": count, "batch": batch, "seq": seq,
                     "samples": samples, "seconds": seconds},
        "draft": made, "speed_up": speed_up, "answers": answers, "different_answers": different, "engines": figures,
    }  # fmt: skip
    write_json(out, (read_json(out) or {}) | {f"{device}, {dtype}": record})
    return 1 if any(different.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
