"""The data module of a run on a prepared corpus, for NeMo 2's trainer under MegatronStrategy.

Import after `nemo_ext.platform.activate()`, as everything of NeMo and Megatron.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from nemo.lightning import io
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from nemo_ext.data.heldout import HeldoutWindows
from nemo_ext.platform.hardware import has_cuda


class CorpusDataModule(pl.LightningDataModule, io.IOMixin):
    """Training and held-out batches of a corpus.

    Training is Megatron's: documents shuffled and packed end to end into sequences of `seq_length`, sources blended by weight,
    one global order that depends on `seed`, the blend and the number of samples, and not on the layout. A run continues at the
    sample after the last consumed one, also with another TP, PP, DP or micro batch size. Attention crosses the documents of a
    sequence, as in Megatron by default. No attention mask is made: the layers are causal.

    Validation is `HeldoutWindows`: at most `val_batches` global batches, the same at every evaluation. None without held-out
    documents or with `val_batches` 0.

    Args: `blend`, rows [weight, train prefix, held-out prefix or None], as `Corpus.blend()` gives them; `tokenizer`, NeMo's,
    for its end-of-document id; `index_cache_dir`, a folder for Megatron's shuffled indices, shared by all ranks.
    Every batch: tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s].
    """

    def __init__(
        self,
        blend: list,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        tokenizer: Any,
        index_cache_dir: str,
        seed: int = 1234,
        num_workers: int = 2,
        val_batches: int = 32,
    ) -> None:
        super().__init__()
        self.blend = [list(row) for row in blend]
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.tokenizer = tokenizer
        self.index_cache_dir = index_cache_dir
        self.seed = seed
        self.num_workers = num_workers
        self.val_batches = val_batches
        self.init_global_step = 0
        self.data_sampler = _EvenlyWeighted(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, dataloader_type="single"
        )
        self._train = None
        self._heldout: HeldoutWindows | None = None

    @property
    def has_heldout(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.val_batches > 0 and any(heldout for _, _, heldout in self.blend)

    def setup(self, stage: str = "") -> None:
        """Build the data sets. Collective: rank 0 writes the indices, the others wait and read them."""
        if self._heldout is None and self.has_heldout:
            prefixes = [heldout for _, _, heldout in self.blend if heldout]
            self._heldout = HeldoutWindows(prefixes, self.seq_length, self.global_batch_size, self.val_batches, self.seed)
        if stage in ("", "fit") and self._train is None:
            self._train = build_train_dataset(
                self.blend,
                samples=self.trainer.max_steps * self.global_batch_size,
                seq_length=self.seq_length,
                seed=self.seed,
                eod=self.tokenizer.eod if hasattr(self.tokenizer, "eod") else self.tokenizer.eos_id,
                index_cache_dir=self.index_cache_dir,
            )

    def train_dataloader(self) -> WrappedDataLoader:
        self.init_global_step = self.data_sampler.init_global_step = self.trainer.global_step
        return self._loader(self._train, "train", self.num_workers)

    def val_dataloader(self) -> WrappedDataLoader | list:
        # A few memory-mapped windows: processes would cost more than they save.
        return self._loader(self._heldout, "validation", 0) if self._heldout is not None else []

    def _loader(self, dataset: Any, mode: str, num_workers: int) -> WrappedDataLoader:
        return WrappedDataLoader(mode=mode, dataset=dataset, num_workers=num_workers, pin_memory=has_cuda())

    def state_dict(self) -> dict[str, Any]:
        """The samples consumed since the start of training, over all resumptions."""
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(self.trainer.global_step - self.init_global_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the samples consumed. The loader is made after this, at the step the checkpoint was written."""
        from megatron.core.num_microbatches_calculator import update_num_microbatches

        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
        update_num_microbatches(consumed_samples=consumed, consistency_check=False)

    def reconfigure_limit_batches(self) -> None:
        """Called by MegatronStrategy: Lightning counts micro batches where the trainer's limits are global batches."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        micro_batches = get_num_microbatches()
        for name in ("limit_train_batches", "limit_val_batches"):
            limit = getattr(self.trainer, name)
            if isinstance(limit, int):
                setattr(self.trainer, name, limit * micro_batches)
        self.trainer.num_sanity_val_steps *= micro_batches


class _EvenlyWeighted(MegatronDataSampler):
    """NeMo logs `val_loss` of a global batch without saying what it weighs, and Lightning, which sees micro batches, takes 1 for
    the first global batch and the micro batch size for the others. Here each global batch weighs the same."""

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        if step.trainer is not None and not step.trainer.training and step.trainer._results is not None:
            step.trainer._results.batch_size = 1
        return super().on_megatron_step_start(step)


class _EndOfDocument:
    """What GPTDataset needs of a tokenizer. Without a pad id: given one, it masks the loss of every such token in the text, and
    tokenizers whose pad is their eos would never learn to end a document."""

    vocab_size = None  # unknown here; the files say how wide their ids are

    def __init__(self, eod: int) -> None:
        self.eod = eod
        self.unique_identifiers = {"eod": eod}


def build_train_dataset(
    blend: Sequence[Sequence], *, samples: int, seq_length: int, seed: int, eod: int, index_cache_dir: str
) -> Any:
    """Megatron's GPTDataset, or BlendedDataset of several, of at least `samples` sequences."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefixes = [train for _, train, _ in blend]
    weights = [float(weight) for weight, _, _ in blend] if len(blend) > 1 else None
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(prefixes, weights), None, None],
        tokenizer=_EndOfDocument(eod),
        path_to_cache=index_cache_dir,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    with _complete_indices(Path(index_cache_dir)):
        return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


@contextlib.contextmanager
def _complete_indices(folder: Path) -> Iterator[None]:
    """Megatron writes indices in place and takes any file for a finished one: remove those that a killed run left cut off, and
    let no second run read what this one is writing."""
    import fcntl

    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob("*.npy"):
            try:
                np.load(path, mmap_mode="r")
            except (ValueError, EOFError, OSError):
                path.unlink()
        yield
