"""The held-out windows: the same sequences at every evaluation, in every parallel layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class HeldoutWindows(torch.utils.data.Dataset):
    """Rows for validation, whole global batches of them.

    The held-out documents of all sources, in one order fixed by the seed, form one stream, cut into windows of `seq_length`
    tokens (and one more to predict); what is left at the end is shorter than a window and not used. At most
    `batches` x `global_batch_size` windows are used, from the start of the stream.

    Every global batch holds the same number of windows, and is filled up with rows whose loss mask is zero. NeMo reports the
    mean over global batches of their token means; with equal numbers of tokens this is exactly the mean over all tokens. Where
    the windows do not divide by the number of batches, fewer than that number are left out.
    """

    def __init__(self, prefixes: Sequence[str], seq_length: int, global_batch_size: int, batches: int, seed: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.seq_length = seq_length
        self.global_batch_size = global_batch_size
        self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        documents = [(d, i) for d, dataset in enumerate(self.datasets) for i in range(len(dataset))]
        lengths = np.concatenate([np.asarray(dataset.sequence_lengths, np.int64) for dataset in self.datasets])
        order = np.random.RandomState(seed).permutation(len(documents))
        self.documents = np.array(documents, np.int64)[order]  # [documents, (dataset, index)]
        self.starts = np.concatenate([[0], np.cumsum(lengths[order])])  # [documents + 1], tokens before each document
        windows = min((int(self.starts[-1]) - 1) // seq_length, batches * global_batch_size)
        if windows < 1:
            raise ValueError(
                f"{int(self.starts[-1])} held-out tokens are less than a sequence of {seq_length} and one more token"
            )
        self.batches = -(-windows // global_batch_size)
        self.windows_per_batch = windows // self.batches

    @property
    def windows(self) -> int:
        """Number of windows whose tokens count."""
        return self.batches * self.windows_per_batch

    def __len__(self) -> int:
        return self.batches * self.global_batch_size

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """tokens, labels, position_ids: int64 [s]; loss_mask: float32 [s], ones, or zeros in a row that fills up a batch."""
        batch, place = divmod(int(row), self.global_batch_size)
        counts = place < self.windows_per_batch
        text = self.window(batch * self.windows_per_batch + place if counts else 0)
        return {
            "tokens": text[:-1].contiguous(),
            "labels": text[1:].contiguous(),
            "loss_mask": torch.full((self.seq_length,), float(counts)),
            "position_ids": torch.arange(self.seq_length),
        }

    def window(self, number: int) -> torch.Tensor:
        """The tokens of a window, int64 [s + 1]; its last is the next one's first."""
        begin = number * self.seq_length
        end = begin + self.seq_length + 1
        parts = []
        document = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while begin < end:
            dataset, index = self.documents[document]
            stop = min(end, int(self.starts[document + 1]))
            if stop > begin:
                parts.append(self.datasets[dataset].get(index, offset=int(begin - self.starts[document]), length=stop - begin))
            begin, document = stop, document + 1
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))
