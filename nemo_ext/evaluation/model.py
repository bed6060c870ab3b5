"""A Hugging Face folder as a model that gives likelihoods and answers, in batches of padded sequences, on one device."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ext.errors import UserError
from nemo_ext.platform import hardware

BATCH = 16  # sequences at once where nothing else is asked for
BATCH_TOKENS = {"GPU": 16384, "CPU": 2048}  # more make a CPU no quicker, and its bar jerk
LOGIT_BYTES = 1 << 30  # of a batch, counted in fp32
DTYPES = ("float32", "bfloat16", "float16")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """A sequence of token ids of which those from `start` on, 1 or more, are to be scored given the ones before."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Answer:
    """A generated text; `complete` if the model ended it and not the limit of new tokens."""

    text: str
    tokens: int
    complete: bool


class Model:
    """Weights and tokenizer of a folder. `platform.activate()` comes before the first one."""

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: str | None = None,
        batch: int | None = None,
        *,
        tokenizer: Path | None = None,
        adapt: Callable[[Any], Any] | None = None,
    ) -> None:
        """`dtype` None: float32 on a CPU, the checkpoint's own on a GPU. `batch` is the number of sequences at once.

        `tokenizer` is the folder of another tokenizer than the model's own; `adapt(network)` gives what is evaluated in place of
        the loaded network, such as the same with an adapter (`nemo_ext.evaluation.adapted`).

        Raises UserError for a folder that transformers cannot read or that lacks weights.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder, self.name, self.batch = folder, name, batch
        kind = getattr(torch, dtype) if dtype else "auto" if hardware.has_cuda() else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder)
            network, report = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, output_loading_info=True)
        except Exception as error:  # the library raises many kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{folder} cannot be loaded: {lines[0]}") from error
        if report["missing_keys"]:
            raise UserError(f"{folder} lacks {len(report['missing_keys'])} tensors, first {sorted(report['missing_keys'])[0]}")
        self._partial_logits = "logits_to_keep" in inspect.signature(network.forward).parameters
        try:
            network = adapt(network) if adapt else network
        except UserError:
            raise
        except Exception as error:  # PEFT raises many kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{name}: the adapter does not fit {folder}: {lines[0]}") from error
        self.network = network.eval().cuda()
        config = network.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", 0) or 2048)
        self.vocabulary = int(config.vocab_size)

    def close(self) -> None:
        """Free the memory."""
        import torch

        del self.network
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def dtype(self) -> str:
        """The weights' dtype by name."""
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def start_id(self) -> int:
        """The token before a text's first: bos, or eos for tokenizers without one. Raises UserError if there is neither."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError(f"{self.folder}: the tokenizer has neither bos nor eos, so a text's first token has nothing before it")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any that the tokenizer would add."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def log_likelihoods(self, requests: Sequence[Request], progress: Progress | None = None) -> list[np.ndarray]:
        """ln p of each scored token of each request (float64 [len(ids) - start], from fp32 log-softmax).

        Requests that differ in the last token only share one forward pass. Sequences are padded on the right, where causal
        attention does not look: results do not depend on the batch but for rounding. `progress` counts requests.
        """
        import torch

        sharing: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            sharing.setdefault(request.ids[:-1], []).append(number)
        found: list[np.ndarray] = [np.empty(0)] * len(requests)
        done = 0
        with torch.inference_mode():
            for inputs in self._batches(sorted(sharing, key=len, reverse=True)):
                first = min(requests[n].start for row in inputs for n in sharing[row]) - 1
                logits = self._logits(inputs, first)
                for row, ids in enumerate(inputs):
                    log_p = torch.log_softmax(logits[row, : len(ids) - first].float(), dim=-1)  # [positions, vocabulary]
                    for n in sharing[ids]:
                        start = requests[n].start
                        targets = torch.tensor(requests[n].ids[start:], device=log_p.device)
                        found[n] = log_p[start - 1 - first :].gather(1, targets[:, None])[:, 0].double().cpu().numpy()
                        done += 1
                if progress:
                    progress(done)
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Continue each prompt (token ids), greedily at temperature 0, else sampling from the whole distribution.

        An answer ends at the end token, before the first of the `stop` texts, or after `max_new_tokens`. Settings of the
        folder's generation_config.json other than its end tokens are not used. Each batch is seeded from `seed` and its place.
        """
        import torch
        from transformers import GenerationConfig

        ends = sorted(self.end_ids())
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0]
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **sampling)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        answers: list[Answer | None] = [None] * len(prompts)
        done = 0
        with torch.inference_mode():
            for begin in range(0, len(order), self.batch or BATCH):
                chosen = order[begin : begin + (self.batch or BATCH)]
                width = max(len(prompts[i]) for i in chosen)
                ids = torch.full((len(chosen), width), pad, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(chosen):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                torch.manual_seed(seed + begin)
                more: dict[str, Any] = dict(stop_strings=list(stop), tokenizer=self.tokenizer) if stop else {}
                new = self.network.generate(
                    ids.cuda(), attention_mask=mask.cuda(), generation_config=config, use_model_defaults=False, **more
                )[:, width:]
                for row, i in enumerate(chosen):
                    answers[i] = self._answer(new[row].tolist(), set(ends), stop)
                done += len(chosen)
                if progress:
                    progress(done)
        return answers  # type: ignore[return-value]

    def _answer(self, ids: list[int], ends: set[int], stop: Sequence[str]) -> Answer:
        length = next((i for i, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        cut = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
        complete = length is not None or cut is not None
        return Answer(text[:cut].strip(), len(ids) if length is None else length, complete)

    def end_ids(self) -> set[int]:
        """End tokens of the generation configuration and the tokenizer."""
        configured = self.network.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured])
        return {token for token in ends | {self.tokenizer.eos_token_id} if token is not None}

    def _batches(self, inputs: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Sequences, longest first, in batches that fit."""
        begin = 0
        while begin < len(inputs):
            length = len(inputs[begin])
            tokens = BATCH_TOKENS["GPU" if hardware.has_cuda() else "CPU"]
            fitting = min(BATCH, tokens // length, LOGIT_BYTES // (4 * length * self.vocabulary))
            size = self.batch or max(1, fitting)
            yield list(inputs[begin : begin + size])
            begin += size

    def _logits(self, inputs: Sequence[tuple[int, ...]], first: int):
        """Logits [b, s - first, vocabulary] from position `first` on."""
        import torch

        width = max(map(len, inputs))
        ids = torch.zeros((len(inputs), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        keep = width - first
        more = {"logits_to_keep": keep} if self._partial_logits else {}
        return self.network(input_ids=ids.cuda(), attention_mask=mask.cuda(), use_cache=False, **more).logits[:, -keep:]
