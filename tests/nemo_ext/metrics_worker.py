"""A tiny Llama trained through the real Trainer and MegatronStrategy, in each process of a group of test_metrics_callback.py."""

import json
from pathlib import Path

import nemo_ext.platform

nemo_ext.platform.activate()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.lightning.pytorch.plugins import MegatronDataSampler  # noqa: E402

from nemo_ext.callbacks.metrics import MetricsCallback  # noqa: E402

SEQ, MICRO, GLOBAL, VOCAB = 32, 1, 4, 128


class Sequences(torch.utils.data.Dataset):
    """`count` counting sequences, each from another start; after `distinct` of them the same again."""

    def __init__(self, count: int, distinct: int) -> None:
        self.count, self.distinct = count, distinct

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(SEQ + 1) + 7 * (index % self.distinct)) % VOCAB
        hidden = torch.ones(1, SEQ, SEQ, dtype=torch.bool).triu(1)
        sample = {"tokens": tokens[:-1], "labels": tokens[1:], "position_ids": torch.arange(SEQ)}
        return {**sample, "loss_mask": torch.ones(SEQ), "attention_mask": hidden}


class Data(pl.LightningDataModule):
    """Held out is the first global batch of the training data, twice: at step 0 its loss is that of the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.data_sampler = MegatronDataSampler(seq_len=SEQ, micro_batch_size=MICRO, global_batch_size=GLOBAL)

    def reconfigure_limit_batches(self) -> None:
        self.trainer.limit_val_batches *= GLOBAL // MICRO  # NeMo counts micro-batches

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Sequences(64, 64), num_workers=0)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(Sequences(2 * GLOBAL, GLOBAL), num_workers=0)


class Reference(pl.Callback):
    """What NeMo logs, read from Lightning's callback_metrics."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, *unused) -> None:
        logged = trainer.callback_metrics
        self.steps.append([trainer.global_step, *(float(logged[key]) for key in ("reduced_train_loss", "lr", "grad_norm"))])

    def on_validation_end(self, trainer, *unused) -> None:
        self.validations.append([trainer.global_step, float(trainer.callback_metrics["val_loss"])])

    def on_fit_end(self, *unused) -> None:
        self.write()

    def on_exception(self, *unused) -> None:
        self.write()

    def write(self) -> None:
        result = {"steps": self.steps, "validations": self.validations}
        Path(self.run_dir, f"reference{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


class EvaluateFirst(pl.Callback):
    """Validation at step 0."""

    def on_train_start(self, trainer, *unused) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


class Poison(pl.Callback):
    """Makes the weights of the last stage NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, *unused) -> None:
        if trainer.global_step + 1 == self.step and mpu.is_pipeline_last_stage():
            next(pl_module.parameters()).data.fill_(float("nan"))


def main(run_dir: str, pp: int, tp: int, steps: int, poisoned: int) -> None:
    """`poisoned` is the step whose weights become NaN; 0: none. Each rank writes what NeMo logged to reference<rank>.json."""
    torch.set_num_threads(1)
    shape = dict(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=VOCAB)
    unfused = ("gradient_accumulation", "masked_softmax", "bias_activation", "bias_dropout", "apply_rope", "cross_entropy_loss")
    config = llm.LlamaConfig(
        **shape,
        **{f"{name}_fusion": False for name in unfused},
        seq_length=SEQ,
        make_vocab_size_divisible_by=VOCAB,
        share_embeddings_and_output_weights=False,
        use_cpu_initialization=True,
        persist_layer_norm=False,
    )
    schedule = nl.lr_scheduler.WarmupPolicyScheduler(warmup_steps=4, max_steps=100, min_lr=0.0)
    optim = nl.MegatronOptimizerModule(
        config=OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=1.0, use_distributed_optimizer=False), lr_scheduler=schedule
    )
    metrics = MetricsCallback(
        run_dir, tokens_per_step=SEQ * GLOBAL, flops_per_token=1e6, num_devices=pp * tp, max_steps=steps, tensorboard=True
    )
    strategy = nl.MegatronStrategy(
        pipeline_model_parallel_size=pp,
        tensor_model_parallel_size=tp,
        pipeline_dtype=torch.float32,
        ddp=DistributedDataParallelConfig(check_for_nan_in_grad=False),
        replace_progress_bar=False,
    )
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=pp * tp,
        max_steps=steps,
        strategy=strategy,
        callbacks=[Reference(run_dir), metrics, EvaluateFirst(), Poison(poisoned)],
        num_sanity_val_steps=0,
        limit_val_batches=2,
        val_check_interval=3,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    model = llm.LlamaModel(config, optim=optim)
    trainer.fit(model, datamodule=Data())
