"""Trains a tiny Llama in NeMo's trainer on the same conversations, in several cases.

Start-up of NeMo is paid once: between cases the model-parallel groups are built anew.
"""

import gc
import json
import os
from pathlib import Path

from nemo_ext import platform

platform.activate()

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from layouts import reset, set_up_again  # noqa: E402  (tests/training)
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from nemo import lightning as nl  # noqa: E402
from nemo.collections import llm  # noqa: E402
from nemo.collections.common.tokenizers import AutoTokenizer  # noqa: E402

from nemo_ext.data.chat.module import ChatDataModule  # noqa: E402


class Record(pl.Callback):
    """Losses of training steps, gradient-dependent as they are from the second on; validation as NeMo logs it and by hand."""

    def __init__(self) -> None:
        self.losses, self.val_losses, self.val_weights, self.val_loss, self.by_hand = [], [], [], None, None
        self.apart, self.leaked = 0.0, 0.0  # packed against alone: largest difference of a token's loss with and without mask

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_batch_end(self, trainer, module, outputs, *_) -> None:
        self.val_losses.append(float(outputs))

    def on_validation_end(self, trainer, module) -> None:
        self.val_weights = trainer.datamodule.val_weights
        self.val_loss = float(trainer.callback_metrics["val_loss"])
        if trainer.strategy.pipeline_model_parallel_size > 1:
            return  # no process has the whole model
        gpt = trainer.strategy.megatron_parallel[0].module
        held = trainer.datamodule._heldout
        total = weight = 0.0
        with torch.no_grad():
            for place in held.places:
                documents = held.documents(place)
                row = held.rows.row(documents)
                packed = loss_of(gpt, row, row.get("attention_mask"))
                without = loss_of(gpt, row, None)
                start = 0
                for ids, weights in documents:
                    ids, weights = torch.from_numpy(ids), torch.from_numpy(weights.astype("float64"))
                    alone = gpt(ids[None, :-1], torch.arange(len(ids) - 1)[None], None, labels=ids[None, 1:])[0]
                    part = slice(start, start := start + len(alone))
                    self.apart = max(self.apart, float((packed[part] - alone).abs().max()))
                    self.leaked = max(self.leaked, float((without[part] - alone).abs().max()))
                    total += float((alone.double() * weights[1:]).sum())
                    weight += float(weights[1:].sum())
        self.by_hand = total / weight


def loss_of(gpt, row, mask):
    return gpt(row["tokens"][None], row["position_ids"][None], None if mask is None else mask[None], labels=row["labels"][None])[
        0
    ]


def run(plan: dict, case: dict) -> Record:
    tokenizer = AutoTokenizer(plan["tokenizer"])
    config = llm.LlamaConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=2, seq_length=plan["seq"],
        vocab_size=1024, gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, cross_entropy_loss_fusion=False, persist_layer_norm=False,
        use_cpu_initialization=True, calculate_per_token_loss=case.get("per_token", True), init_method_std=0.2,
    )  # fmt: skip
    record = Record()
    data = ChatDataModule(
        blend=plan["blend"], seq_length=plan["seq"], micro_batch_size=case["micro"], global_batch_size=case["global"],
        tokenizer=tokenizer, num_workers=0, val_batches=100, pack=case["pack"],
    )  # fmt: skip
    trainer = nl.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), max_steps=case["steps"], callbacks=[record],
        log_every_n_steps=1, limit_val_batches=1000, val_check_interval=case["steps"], num_sanity_val_steps=0, precision=32,
        use_distributed_sampler=False, enable_checkpointing=False, logger=False, enable_progress_bar=False,
        strategy=nl.MegatronStrategy(
            pipeline_dtype=torch.float32, gradient_as_bucket_view=True, tensor_model_parallel_size=case.get("tp", 1),
            pipeline_model_parallel_size=case.get("pp", 1),
        ),
    )  # fmt: skip
    optimizer = nl.MegatronOptimizerModule(config=OptimizerConfig(optimizer="sgd", lr=0.5, params_dtype=torch.float32))
    torch.manual_seed(1)
    trainer.fit(llm.LlamaModel(config, tokenizer=tokenizer, optim=optimizer), datamodule=data)
    return record


def main(plan: dict, out: Path) -> None:
    """Run all cases of the plan, and leave what `Record` holds of each in the JSON file `out`."""
    torch.set_num_threads(1)
    set_up_again()
    results = {}
    for case in plan["cases"]:
        record = run(plan, case)
        results[case["name"]] = {k: v for k, v in vars(record).items() if isinstance(v, (list, float))}
        for name in [n for n in os.environ if n.startswith("NVTE_")]:
            del os.environ[name]  # Megatron notes one model's attention backend there and refuses another's
        reset()
        gc.collect()
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
