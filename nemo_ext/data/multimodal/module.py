"""The data module of conversations with images and sounds, for NeMo 2's trainer under MegatronStrategy.

Import after `nemo_ext.platform.activate()`, as everything of NeMo and Megatron.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import default_collate

from nemo_ext.data.chat import module
from nemo_ext.data.chat.module import ChatDataModule
from nemo_ext.data.multimodal.inputs import Input
from nemo_ext.data.multimodal.media import Media
from nemo_ext.data.multimodal.store import Samples
from nemo_ext.data.multimodal.tiling import NEWLINE
from nemo_ext.errors import UserError
from nemo_ext.platform.hardware import has_cuda


class MultimodalDataModule(ChatDataModule):
    """ChatDataModule of samples with media (`multimodal.store`), whose images and sounds are decoded in the loader's workers.

    The same order, packing, validation and resumption. `senses` are ImageInput and AudioInput, one a modality. What can no longer
    be read or decoded ends the run, or with `skip_bad` is named on standard error: its conversation then counts nothing in the
    loss, and the encoder sees zeros in its place.

    Every batch has, for each sense (modality "vision" or "audio"), also
        <modality>_inputs float32 [n, ...]: the encoder's inputs of the whole micro batch in order; n may be 0
        <modality>_gather int64 [p]: for each placeholder in `tokens`, row by row, which row of the features [n * sense.tokens]
            it is; n * sense.tokens is the newline
    Both are empty on pipeline stages but the first, which have no use for them: nothing is decoded there.
    """

    samples = Samples

    def __init__(
        self,
        blend: list,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        tokenizer: Any,
        senses: list[Input],
        seed: int = 1234,
        num_workers: int = 2,
        val_batches: int = 32,
        pack: bool = True,
        thd: bool | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(
            blend, seq_length, micro_batch_size, global_batch_size, tokenizer, seed, num_workers, val_batches, pack, thd
        )
        self.senses = list(senses)
        self.skip_bad = skip_bad

    def encoded(self, step: int) -> dict[str, int]:
        """How many inputs the encoder of each modality gets in training step `step` (from 0), over all ranks."""
        size, found = self.global_batch_size, {each.sense.modality: 0 for each in self.senses}
        sources = {each.sense.modality: each for each in self.senses}
        for row in range(step * size, (step + 1) * size):
            for _, _, media in self._train.documents(row):
                for each in media:
                    found[each.modality] += sources[each.modality].count(each.shape)
        return found

    def val_dataloader(self) -> WrappedDataLoader | list:
        return self._loader(self._heldout, "validation", self.num_workers) if self._heldout is not None else []

    def _loader(self, dataset: Any, mode: str, num_workers: int) -> WrappedDataLoader:
        return WrappedDataLoader(
            mode=mode, dataset=dataset, num_workers=num_workers, pin_memory=has_cuda(), collate_fn=self._collate()
        )

    def _collate(self) -> Collate:
        return Collate(self.senses)

    def _rows(self, eod: int, unit: int, attention: str) -> RowBuilder:
        from megatron.core import parallel_state

        decodes = not parallel_state.model_parallel_is_initialized() or parallel_state.is_pipeline_first_stage(
            ignore_virtual=True
        )
        return RowBuilder(self.seq_length, eod, unit, attention, self.senses, self.skip_bad, decodes)


class MediaLost(UserError):
    """What was prepared can no longer be read or decoded. A loader hands on what its worker raised as a new error with the whole
    traceback for a message: the last line is what was said."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class RowBuilder(module.RowBuilder):
    """Rows with the inputs of their media. `<modality>_gather` of a row counts from its own first input, NEWLINE for newlines."""

    def __init__(
        self, seq_length: int, eod: int, unit: int, attention: str, inputs: Iterable[Input], skip_bad: bool, decodes: bool
    ) -> None:
        super().__init__(seq_length, eod, unit, attention)
        self.inputs = {each.sense.modality: each for each in inputs}
        self.skip_bad = skip_bad
        self.decodes = decodes
        self.skipped: set[str] = set()  # places of media that were named already

    def row(self, documents: Sequence[tuple], counts: bool = True) -> dict[str, torch.Tensor]:
        """A row of documents (ids, weights, media)."""
        made: dict[str, list[np.ndarray]] = {modality: [] for modality in self.inputs}
        gathers: dict[str, list[np.ndarray]] = {modality: [] for modality in self.inputs}
        plain = []
        for ids, weights, media in documents:
            inputs = [self._inputs(each) for each in media] if self.decodes else []
            if any(each is None for each in inputs):
                weights = np.zeros_like(weights)
            for each, array in zip(media, inputs, strict=False):
                source = self.inputs[each.modality]
                if array is None:
                    array = np.zeros((source.count(each.shape), *source.input_shape), np.float32)
                before = sum(len(a) for a in made[each.modality]) * source.sense.tokens
                index = source.gather(each.shape)
                if each is media[-1] and ids[-1] == source.sense.token_id:
                    index = index[:-1]  # the last token of a document is only predicted
                gathers[each.modality].append(np.where(index == NEWLINE, NEWLINE, index + before))
                made[each.modality].append(array)
            plain.append((ids, weights))
        row = super().row(plain, counts)
        for modality, source in self.inputs.items():
            arrays, indices = made[modality], gathers[modality]
            row[f"{modality}_inputs"] = torch.from_numpy(
                np.concatenate(arrays) if arrays else np.empty((0, *source.input_shape), np.float32)
            )
            row[f"{modality}_gather"] = torch.from_numpy(np.concatenate(indices) if indices else np.empty(0, np.int64))
        return row

    def _inputs(self, media: Media) -> np.ndarray | None:
        """The encoder's inputs, None for what was skipped."""
        try:
            return self.inputs[media.modality].inputs(media.location.read(), media.shape)
        except UserError as error:
            named = str(error) if str(media.location) in str(error) else f"{media.location}: {error}"
            if not self.skip_bad:
                raise MediaLost(named) from None
            if named not in self.skipped:
                self.skipped.add(named)
                print(f"skipped: {named}", file=sys.stderr, flush=True)
            return None


class Collate:
    """Rows to a micro batch. The inputs of all rows stand one after another, since rows have different numbers of them."""

    def __init__(self, inputs: Iterable[Input]) -> None:
        self.tokens = {each.sense.modality: each.sense.tokens for each in inputs}

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ragged = {f"{modality}_{kind}" for modality in self.tokens for kind in ("inputs", "gather")}
        batch = default_collate([{name: value for name, value in row.items() if name not in ragged} for row in rows])
        for modality, tokens in self.tokens.items():
            inputs = [row[f"{modality}_inputs"] for row in rows]
            total = sum(map(len, inputs)) * tokens
            gathers, before = [], 0
            for row, each in zip(rows, inputs, strict=True):
                index = row[f"{modality}_gather"]
                gathers.append(torch.where(index == NEWLINE, total, index + before))
                before += len(each) * tokens
            batch[f"{modality}_inputs"], batch[f"{modality}_gather"] = torch.cat(inputs), torch.cat(gathers)
        return batch
