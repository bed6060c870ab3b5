"""A model with eyes: this project's recipe and Hugging Face's LLaVA with its Trainer, the same shapes, weights random, one run.

    python benchmarks/neva_gpu.py case=align case=lora gpus=1 out=benchmarks/results/neva_gpu.json
    python benchmarks/neva_gpu.py case=instruct gpus=2 tp=2 theirs=false out=...
    python benchmarks/neva_gpu.py case=align shape=tiny steps=4 warm=1 out=/tmp/neva.json       (on a CPU)

Shapes: SigLIP-so400m/14-384 and Llama-3-8B in bf16; `shape=tiny` for a machine without a GPU. A row has `images=` (2) images and
text up to `seq=` (2048) tokens, all of which learn but the images' places; `rows=` (8) rows a step of `micro_batch=` (1). Cases:
align (projector), lora (projector and LoRA of rank 16), instruct (projector and language model). `recompute=true` recomputes
ours. Theirs: transformers' LLaVA with SDPA attention and its Trainer, gradient checkpointing where the language model is trained
(`checkpointing=`) and fused AdamW, on one GPU. Medians of the steps after the first `warm=` (5) of `steps=` (15). The tower's
share is the time of its forward passes (ours with the projector's), by CUDA events, over that of a step. Memory is the largest
of all ranks that torch allocated, in GiB.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from nemo_ext.architecture import Architecture  # noqa: E402
from nemo_ext.multimodal import towers  # noqa: E402
from recipes.models import size  # noqa: E402

GIB = 2**30
CASES = {
    "align": dict(stage="align"),
    "lora": dict(stage="instruct", train_language="lora", rank=16, alpha=32.0),
    "instruct": dict(stage="instruct"),
}
TINY = Architecture("llama", 2, 64, 128, 4, num_query_groups=2, vocab_size=512, rotary_base=500_000.0)
DEFAULTS = dict(shape="full", gpus=1, tp=1, pp=1, images=2, seq=2048, rows=8, micro_batch=1, steps=15, warm=5, theirs=True,
                checkpointing=True)  # fmt: skip
TOKEN = 3  # the placeholder's id


def parts(options: dict[str, Any]) -> tuple[Architecture, Any]:
    """The decoder and the sense."""
    full = options["shape"] == "full"
    shape = size("llama3", "8b").architecture if full else TINY
    return shape, towers.sense(towers.shape("siglip-so400m-14-384" if full else "glyphs"), token_id=TOKEN)


def batch(options: dict[str, Any], sense, vocab: int, rows: int, seed: int) -> dict[str, Any]:
    """Random rows, on the CPU."""
    import torch

    random, seq, each = torch.Generator().manual_seed(seed), options["seq"], sense.tokens
    if options["images"] * (each + 1) >= seq:
        raise SystemExit(f"seq={seq} has no room for images={options['images']} of {each} embeddings")
    ids = torch.randint(8, vocab, (rows, seq + 1), generator=random)
    for image in range(options["images"]):
        start = 1 + image * (each + 1)
        ids[:, start : start + each] = TOKEN
    count, side = rows * options["images"], sense.encoder.config["image_size"]
    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": (ids[:, 1:] != TOKEN).float(),
        "position_ids": torch.arange(seq).expand(rows, seq).contiguous(),
        "vision_inputs": torch.randn(count, 3, side, side, generator=random),
        "vision_gather": torch.arange(count * each),
    }


class Clock:
    """Seconds that a module's forward passes take, one number a step: `tick()` ends a step."""

    def __init__(self, module, device: str):
        import torch

        self.events: list[tuple[Any, Any]] = []
        self.cuda, self.torch, self.seconds = device == "gpu", torch, []
        module.register_forward_pre_hook(lambda *_: self.events.append((self.now(), None)))
        module.register_forward_hook(lambda *_: self.events.append((self.events.pop()[0], self.now())))

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = self.torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def tick(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()
        between = [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.events]
        self.seconds.append(sum(between))
        self.events.clear()


def ours(options: dict[str, Any], case: str, folder: Path) -> dict[str, Any]:
    """One process of the recipe, started by torchrun: its figures, of rank 0."""
    from nemo_ext import platform

    cpu = platform.activate()
    import fiddle as fdl
    import nemo_run as run
    import torch
    from lightning.pytorch.callbacks import Callback
    from nemo.lightning.data import WrappedDataLoader

    import recipes
    from nemo_ext.data.chat.module import ChatDataModule

    shape, sense = parts(options)
    device = "cpu" if cpu else "gpu"
    keys = dict(CASES[case], device=device, seq=options["seq"], global_batch=options["rows"], micro_batch=options["micro_batch"],
                steps=options["steps"], gpus=options["gpus"], tp=options["tp"], pp=options["pp"], pack=False, keep=0,
                val_batches=0, warmup=1, tensorboard=False, recompute="full" if options["recompute"] else "none")  # fmt: skip
    senses = [{"sense": sense.to_dict(), "settings": None}]
    recipe = recipes.load("neva_llama3", shape=shape, senses=senses, **keys)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return options["rows"] * options["steps"]

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            return batch(options, sense, shape.vocab_size, 1, number)

    def join(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        joined["vision_gather"] = torch.arange(len(joined["vision_gather"]))
        return joined

    class Data(ChatDataModule):
        def setup(self, stage: str = "") -> None:
            self._train = Rows()

        def _loader(self, dataset: Any, mode: str, num_workers: int) -> WrappedDataLoader:
            return WrappedDataLoader(mode=mode, dataset=dataset, num_workers=num_workers, collate_fn=join)

    class Watch(Callback):
        def on_train_start(self, trainer, *unused) -> None:
            first = trainer.strategy.megatron_parallel[0].module.module
            self.clock = next((Clock(m, device) for n, m in first.named_modules() if n.endswith("senses.vision")), None)
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, *unused) -> None:
            if not cpu:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
            if self.clock:
                self.clock.tick()

        def on_train_end(self, trainer, *unused) -> None:
            peak = torch.tensor(0.0 if cpu else torch.cuda.max_memory_allocated())
            if torch.distributed.is_initialized():
                peak = peak.to("cuda") if not cpu else peak
                torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
            if trainer.is_global_zero:
                steps = [b - a for a, b in zip(self.times[:-1], self.times[1:], strict=True)]
                found = dict(steps=steps, tower=self.clock.seconds, memory_gib=peak.item() / GIB)
                (folder / "ours.json").write_text(json.dumps(found))

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipes.bind(recipe, run_dir=str(folder / "run"), tokenizer=str(_tokenizer(folder)), blend=[[None, "", None]], weights=None,
                 checkpoint=None)  # fmt: skip
    fields = {name: getattr(recipe.data, name) for name in recipe.data.__arguments__ if name not in ("senses", "skip_bad")}
    recipe.data = run.Config(Data, **fields)
    recipe.trainer.callbacks.append(run.Config(Watch))
    fdl.build(recipe)()


def _tokenizer(folder: Path) -> Path:
    """NeMo wants one; the rows are random."""
    out = folder / "tokenizer"
    if not out.is_dir() and int(os.environ.get("RANK", "0")) == 0:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(out)
    while not (out / "tokenizer_config.json").is_file():
        time.sleep(0.05)
    return out


def theirs(options: dict[str, Any], case: str, folder: Path) -> None:
    """The same steps with transformers' LLaVA on one GPU."""
    from nemo_ext import platform

    platform.activate()
    import torch
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    shape, sense = parts(options)
    cuda = torch.cuda.is_available()
    place, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    text = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads, rope_theta=shape.rotary_base,
        num_key_value_heads=shape.num_query_groups, max_position_embeddings=131072,
    )  # fmt: skip
    vision = SiglipVisionConfig(**{k: v for k, v in sense.encoder.config.items() if k != "model_type"})
    config = LlavaConfig(vision, text, image_token_index=TOKEN, vision_feature_layer=-2, vision_feature_select_strategy="full")
    with torch.device(place):
        torch.set_default_dtype(dtype)
        model = LlavaForConditionalGeneration(config).train()
        torch.set_default_dtype(torch.float32)
    if case != "instruct":
        model.requires_grad_(False)
    if case == "lora":
        from peft import LoraConfig, get_peft_model

        names = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=rf".*language_model.*{names}"))
    inner = model.get_base_model() if case == "lora" else model
    inner.model.vision_tower.requires_grad_(False)
    inner.model.multi_modal_projector.requires_grad_(True)
    clock = Clock(inner.model.vision_tower, "gpu" if cuda else "cpu")
    times: list[float] = []

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return options["rows"] * options["steps"]

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            row = batch(options, sense, shape.vocab_size, 1, number)
            labels = row["tokens"].masked_fill(row["tokens"] == TOKEN, -100)  # the model moves them by one place itself
            return {"input_ids": row["tokens"], "labels": labels, "pixel_values": row["vision_inputs"].to(dtype)}

    def join(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    class Watch(TrainerCallback):
        def on_train_begin(self, *unused: Any, **more: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *unused: Any, **more: Any) -> None:
            clock.tick()
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=options["micro_batch"], max_steps=options["steps"],
        gradient_accumulation_steps=options["rows"] // options["micro_batch"], learning_rate=1e-4, max_grad_norm=1.0,
        optim="adamw_torch_fused" if cuda else "adamw_torch", gradient_checkpointing=options["checkpointing"] and case != "align",
        gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=not cuda, logging_strategy="no", save_strategy="no",
        report_to=[], remove_unused_columns=False, dataloader_num_workers=2 if cuda else 0, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(), data_collator=join, callbacks=[Watch()]).train()
    steps = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    (folder / "theirs.json").write_text(json.dumps(dict(steps=steps, tower=clock.seconds, memory_gib=peak)))


def figures(found: dict[str, Any], options: dict[str, Any], gpus: int) -> dict[str, Any]:
    """Medians after the warm-up, a GPU where it says so."""
    if "error" in found:
        return found
    seconds, tower = (statistics.median(found[name][options["warm"] :]) for name in ("steps", "tower"))
    return {
        "step_seconds": seconds,
        "tokens_per_s_per_gpu": options["rows"] * options["seq"] / seconds / gpus,
        "images_per_s": options["rows"] * options["images"] / seconds,
        "tower_share": tower / seconds,
        "memory_gib": found["memory_gib"],
    }


def side(name: str, options: dict[str, Any], case: str, gpus: int) -> dict[str, Any]:
    """Figures of ours or theirs, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps({"side": name, "options": options, "case": case, "folder": folder})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", __file__, job]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        out = Path(folder) / f"{name}.json"
        found = json.loads(out.read_text()) if out.is_file() else {"error": (done.stdout + done.stderr)[-4000:]}
    return figures(found, options, gpus)


def main(arguments: list[str]) -> None:
    if len(arguments) == 1 and arguments[0].startswith("{"):
        job = json.loads(arguments[0])
        {"ours": ours, "theirs": theirs}[job["side"]](job["options"], job["case"], Path(job["folder"]))
        return
    pairs = [argument.split("=", 1) for argument in arguments]
    given = {name: json.loads(value) if name not in ("shape", "out", "case") else value for name, value in pairs}
    options = {**DEFAULTS, "recompute": False, **{name: value for name, value in given.items() if name not in ("case", "out")}}
    out = Path(given["out"])
    for case in [value for name, value in pairs if name == "case"]:
        row: dict[str, Any] = {"options": options, "date": datetime.date.today().isoformat(), "gpu": machine.device()}
        row["ours"] = side("ours", options, case, options["gpus"])
        if options["theirs"]:
            row["theirs"] = side("theirs", options, case, 1)
        print(case, json.dumps({name: row[name] for name in ("ours", "theirs") if name in row}), flush=True)
        held = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({**held, f"{case}-{options['gpus']}gpu-tp{options['tp']}-pp{options['pp']}": row}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
