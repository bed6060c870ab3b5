"""The data module for supervised fine-tuning on prepared conversations, for NeMo 2's trainer under MegatronStrategy.

Import after `nemo_ext.platform.activate()`, as everything of NeMo and Megatron.

The model must have `calculate_per_token_loss=True`: Megatron then adds up the gradients of all counting tokens of a global batch
and divides by their weight once. Without it, each micro batch is averaged by itself, and tokens of short answers count more than
those of long ones, depending on packing, micro batch and data parallelism. NeMo and Megatron count weights in integers (a micro
batch's sum is cut to one), so loss masks here are the weights in units that make all of them integers: 1 for every token where no
turn has a weight of its own. Only ratios of weights matter to the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler

from nemo_ext.data.chat.pack import Packing, one_each, pack
from nemo_ext.data.chat.store import Samples
from nemo_ext.data.module import CorpusDataModule
from nemo_ext.errors import UserError
from nemo_ext.platform.hardware import has_cuda


class ChatDataModule(CorpusDataModule):
    """Training and held-out batches of conversations, packed into rows of `seq_length` tokens or one a row.

    The order of rows depends on the seed and the blend alone, so that a run continues at the row after the last consumed one,
    also with another TP, PP, DP, micro batch size or number of steps. Every epoch of a source shuffles its rows, and which
    conversations of equal length share one. Sources without weights go round together, each row once an epoch; with weights they
    are shares of the rows.

    Validation goes through the held-out conversations, at most `val_batches` global batches of rows, the same at every
    evaluation; what is missing in the last batch are rows of loss mask zero. `val_weights` is what each batch weighs in the mean
    over all tokens; Lightning's `val_loss` is weighted so.

    Args: `blend`, rows [weight or None, train prefix, held-out prefix or None], as `ChatCorpus.blend()` gives them; `tokenizer`,
    NeMo's, for its end-of-document id, which fills rows; `pack`; `thd`: attention of packed rows by `cu_seqlens` for Transformer
    Engine rather than by a mask, None for yes on a GPU.
    Every batch: tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s]; packed also attention_mask bool [b, 1, s, s]
    (True: not seen), or cu_seqlens int32 [1, documents + 2] (ends in -1), cu_seqlens_argmin and max_seqlen [1, 1].
    """

    samples = Samples

    def __init__(
        self,
        blend: list,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        tokenizer: Any,
        seed: int = 1234,
        num_workers: int = 2,
        val_batches: int = 32,
        pack: bool = True,
        thd: bool | None = None,
    ) -> None:
        super().__init__(blend, seq_length, micro_batch_size, global_batch_size, tokenizer, "", seed, num_workers, val_batches)
        self.pack = pack
        self.thd = pack and (has_cuda() if thd is None else thd)
        if self.thd and micro_batch_size != 1:
            raise UserError(
                f"micro_batch={micro_batch_size}: packed rows are one a micro batch: micro_batch=1, and a longer seq="
            )
        self.data_sampler = _WeightedByTokens(
            self, seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    @property
    def val_weights(self) -> list[float]:
        """The sum of the loss mask of each held-out global batch. Empty before `setup` and without held-out conversations."""
        return self._heldout.batch_weights if self._heldout is not None else []

    @property
    def rows_per_epoch(self) -> list[int]:
        """Rows of each source that one pass over its training conversations takes. After `setup("fit")`."""
        return [len(source.packing) for source in self._train.sources]

    def learnt(self, step: int) -> int:
        """The weight of all tokens that training step `step` (from 0) learns, over all ranks. After `setup("fit")`."""
        size = self.global_batch_size
        return sum(self._train.weight(row) for row in range(step * size, (step + 1) * size))

    def setup(self, stage: str = "") -> None:
        """Map the samples and pack them. The same on every rank, without a word between them."""
        from megatron.core import parallel_state

        if self.thd and parallel_state.model_parallel_is_initialized() and parallel_state.get_context_parallel_world_size() > 1:
            raise UserError("cp=: packed conversations cannot be split over context parallel ranks: cp=1, or pack=false")
        eod = self.tokenizer.eod if hasattr(self.tokenizer, "eod") else self.tokenizer.eos_id
        training = [self.samples(train) for _, train, _ in self.blend]
        unit = math.gcd(*(samples.unit for samples in training))
        rows = self._rows(eod, unit, "cu_seqlens" if self.thd else "mask" if self.pack else "none")
        if self._heldout is None and self.has_heldout:
            held = [self.samples(heldout) for _, _, heldout in self.blend if heldout]
            self._heldout = HeldoutRows(held, rows, self.pack, self.global_batch_size, self.val_batches, self.seed)
        if stage in ("", "fit") and self._train is None:
            weights = [weight for weight, _, _ in self.blend]
            count = self.trainer.max_steps * self.global_batch_size
            self._train = TrainingRows(training, weights, rows, self.pack, count, self.seed)

    def _rows(self, eod: int, unit: int, attention: str) -> RowBuilder:
        return RowBuilder(self.seq_length, eod, unit, attention)


class RowBuilder:
    """Conversations side by side in a row of `seq_length`, each predicting its own next tokens from its own tokens alone.

    `eod` fills the rest. Loss masks are weights in multiples of `unit` hundredths. `attention` is how documents are kept apart:
    "mask", "cu_seqlens", or "none" where a row holds one.
    """

    def __init__(self, seq_length: int, eod: int, unit: int, attention: str) -> None:
        self.seq_length = seq_length
        self.eod = eod
        self.unit = unit
        self.attention = attention

    def row(self, documents: Sequence[tuple[np.ndarray, np.ndarray]], counts: bool = True) -> dict[str, torch.Tensor]:
        """A row of documents (ids, weights), with a loss mask of zero unless it `counts`."""
        s = self.seq_length
        tokens, labels = np.full(s, self.eod, np.int64), np.full(s, self.eod, np.int64)
        mask, positions = np.zeros(s, np.float32), np.zeros(s, np.int64)
        ends = [0]
        for ids, weights, *_ in documents:
            start, end = ends[-1], ends[-1] + len(ids) - 1
            tokens[start:end], labels[start:end] = ids[:-1], ids[1:]
            positions[start:end] = np.arange(end - start)
            if counts:
                mask[start:end] = weights[1:] // self.unit
            ends.append(end)
        if ends[-1] < s:  # the filling is a document of its own
            positions[ends[-1] :] = np.arange(s - ends[-1])
            ends.append(s)
        row = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions}
        if self.attention == "mask":
            document = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
            seen = (document[:, None] == document[None, :]) & np.tri(s, dtype=bool)
            row["attention_mask"] = ~seen[None]
        elif self.attention == "cu_seqlens":
            row["cu_seqlens"] = np.array([*ends, -1], np.int32)
            row["cu_seqlens_argmin"] = np.array([len(ends)], np.int64)
            row["max_seqlen"] = np.array([np.diff(ends).max()], np.int32)
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in row.items()}

    def weight(self, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
        """The sum of the loss mask of a row of these documents."""
        return sum(int((weights[1:] // self.unit).sum(dtype=np.int64)) for _, weights, *_ in documents)


class _Source:
    """The samples of one source, and how they share rows."""

    def __init__(self, samples: Samples, packed: bool, seq_length: int) -> None:
        self.samples = samples
        self.slots = samples.lengths - 1  # the last token is only predicted
        self.check(seq_length)
        self.packing = pack(self.slots, seq_length) if packed else one_each(len(samples))
        self.packed = packed
        self._epoch: tuple[int, Packing, np.ndarray] | None = None

    def check(self, seq_length: int) -> None:
        if self.slots.max(initial=0) > seq_length:
            raise UserError(
                f"{self.samples.prefix}: prepared for sequences of at least {self.slots.max()} tokens, not seq={seq_length}"
            )

    def documents(self, row: int, seed: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The samples of a row, counted over all epochs."""
        number, row = divmod(row, len(self.packing))
        if self._epoch is None or self._epoch[0] != number:
            packing = self.packing.shuffled_ties(self.slots, [*seed, number, 0]) if self.packed else self.packing
            self._epoch = number, packing, np.random.default_rng([*seed, number, 1]).permutation(len(packing))
        _, packing, order = self._epoch
        return [self.samples[int(item)] for item in packing[int(order[row])]]


class TrainingRows(torch.utils.data.Dataset):
    """`count` rows of several sources, blended evenly by weight from the first row on."""

    def __init__(
        self, training: list[Samples], weights: list[float | None], rows: RowBuilder, packed: bool, count: int, seed: int
    ) -> None:
        self.rows, self.seed = rows, seed
        self.sources = [_Source(samples, packed, rows.seq_length) for samples in training]
        shares = [len(s.packing) if weight is None else weight for s, weight in zip(self.sources, weights, strict=True)]
        self.source_of, self.row_of = blend(shares, count)

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self.rows.row(self.documents(number))

    def weight(self, number: int) -> int:
        """The sum of a row's loss mask."""
        return self.rows.weight(self.documents(number))

    def documents(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The samples of a row."""
        source = int(self.source_of[number])
        return self.sources[source].documents(int(self.row_of[number]), [self.seed, source])


def blend(shares: Sequence[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source each of `count` rows is from (int16 [rows]), and which of its rows it is (int64 [rows]).

    Row k of a source with share w has its turn at (k + 1/2) / w: every beginning of the order is blended as the whole is, and
    does not depend on `count`.
    """
    total = sum(shares)
    turns, sources, rows = [], [], []
    for source, share in enumerate(shares):
        number = np.arange(min(count, math.ceil((count + len(shares)) * share / total) + 1), dtype=np.int64)
        turns.append((number + 0.5) / (share / total))
        sources.append(np.full(len(number), source, np.int16))
        rows.append(number)
    order = np.argsort(np.concatenate(turns), kind="stable")[:count]
    return np.concatenate(sources)[order], np.concatenate(rows)[order]


class HeldoutRows(torch.utils.data.Dataset):
    """The held-out conversations of all sources in whole global batches, in one order fixed by the seed."""

    def __init__(
        self, held: list[Samples], rows: RowBuilder, packed: bool, global_batch_size: int, batches: int, seed: int
    ) -> None:
        self.rows, self.global_batch_size = rows, global_batch_size
        self.sources = [_Source(samples, packed, rows.seq_length) for samples in held]
        every = [(s, row) for s, source in enumerate(self.sources) for row in range(len(source.packing))]
        order = np.random.RandomState(seed).permutation(len(every))[: batches * global_batch_size]
        self.places = [every[i] for i in order]
        self.batches = -(-len(self.places) // global_batch_size)
        self.batch_weights = [
            float(sum(self._weight(place) for place in self.places[i : i + global_batch_size]))
            for i in range(0, len(self.places), global_batch_size)
        ]

    def __len__(self) -> int:
        return self.batches * self.global_batch_size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        counts = number < len(self.places)
        return self.rows.row(self.documents(self.places[number if counts else 0]), counts)

    def documents(self, place: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The samples of a row (source, row)."""
        source = self.sources[place[0]]
        return [source.samples[int(item)] for item in source.packing[place[1]]]

    def _weight(self, place: tuple[int, int]) -> int:
        return self.rows.weight(self.documents(place))


class _WeightedByTokens(MegatronDataSampler):
    """NeMo logs `val_loss` of a global batch without saying what it weighs: here, the weight of its tokens."""

    def __init__(self, data: ChatDataModule, **arguments: Any) -> None:
        super().__init__(dataloader_type="single", **arguments)
        self.data = data
        self.evaluated = 0  # global batches since the last training step

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        if step.trainer is not None and step.trainer.training:
            self.evaluated = 0
        elif step.trainer is not None and step.trainer._results is not None:
            weights = self.data.val_weights
            step.trainer._results.batch_size = weights[self.evaluated % len(weights)]
            self.evaluated += 1
        return super().on_megatron_step_start(step)
