"""A small run of NeMo's trainer on a prepared corpus."""

import os
from pathlib import Path

from nemo_ext import platform

platform.activate()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.collections.common.tokenizers import AutoTokenizer  # noqa: E402

from nemo_ext.data.corpus import Corpus  # noqa: E402
from nemo_ext.data.module import CorpusDataModule  # noqa: E402

SEQ, MICRO, GLOBAL, STEPS = 32, 8, 64, 4


class Record(pl.Callback):
    """Validation losses as NeMo logs them, and by hand over the same windows at the same time; consumed samples."""

    def __init__(self) -> None:
        self.logged, self.by_hand, self.consumed = [], [], []

    def on_validation_epoch_end(self, trainer, module) -> None:
        windows = trainer.datamodule._heldout
        losses = []
        gpt = trainer.strategy.megatron_parallel[0].module
        with torch.no_grad():
            for some in torch.arange(windows.windows).split(50):
                text = torch.stack([windows.window(int(number)) for number in some])
                positions = torch.arange(SEQ).expand(len(some), SEQ)
                losses.append(gpt(text[:, :-1], positions, None, labels=text[:, 1:]).double())
        self.by_hand.append(float(torch.cat(losses).mean()))

    def on_validation_end(self, trainer, module) -> None:
        self.logged.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_batch_end(self, trainer, *_) -> None:
        self.consumed.append(trainer.datamodule.state_dict()["consumed_samples"])


def main(folder: Path, tokenizer_dir: Path) -> None:
    """Train on `folder`/corpus.json, and compare the held-out losses with those by hand; `folder`/done says that all held."""
    torch.set_num_threads(1)
    corpus = Corpus.from_json((folder / "corpus.json").read_text())
    tokenizer = AutoTokenizer(str(tokenizer_dir))
    world = int(os.environ["WORLD_SIZE"])
    config = llm.LlamaConfig(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        num_query_groups=2,
        seq_length=SEQ,
        vocab_size=1024,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
    )
    record = Record()
    data = CorpusDataModule(
        blend=corpus.blend(),
        seq_length=SEQ,
        micro_batch_size=MICRO,
        global_batch_size=GLOBAL,
        tokenizer=tokenizer,
        index_cache_dir=str(folder / "index"),
        num_workers=1,
        val_batches=1000,
    )
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=world,
        max_steps=STEPS,
        callbacks=[record],
        log_every_n_steps=1,
        limit_val_batches=1000,
        val_check_interval=2,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        logger=False,
        precision=32,
        strategy=nl.MegatronStrategy(pipeline_dtype=torch.float32, gradient_as_bucket_view=True),
    )
    optimizer = nl.MegatronOptimizerModule(config=OptimizerConfig(optimizer="adam", lr=1e-2, params_dtype=torch.float32))
    model = llm.LlamaModel(config, tokenizer=tokenizer, optim=optimizer)
    trainer.fit(model, datamodule=data)
    assert record.consumed == [GLOBAL * (i + 1) for i in range(STEPS)], record.consumed
    assert len(record.logged) == 2 and record.logged[1] < record.logged[0], record.logged
    for logged, by_hand in zip(record.logged, record.by_hand, strict=True):
        assert abs(logged - by_hand) < 2e-6 * by_hand, (logged, by_hand)
    windows = data._heldout
    assert windows.batches > 1 and windows.windows_per_batch < GLOBAL, (windows.batches, windows.windows_per_batch)
    if trainer.is_global_zero:
        (folder / "done").write_text(f"{record.logged} {windows.batches} {windows.windows}")
