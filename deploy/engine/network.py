"""A transformers model that runs rows of the cache, each with its own tokens, position and adapter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from conversion.multimodal.configuration import CLASSES
from deploy.engine import attention
from deploy.engine.cache import RowCache
from nemo_ext.errors import UserError
from nemo_ext.platform import hardware

DTYPES = ("float32", "bfloat16", "float16")
BASE = "__base__"  # PEFT's word for a row without an adapter
DEFAULT_CONTEXT = 4096
MEMORY_SHARE = 0.8  # of a machine's memory that the cache may take
PROBE = 12  # tokens of the check against the model's own cache
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # of the largest logit


class Network:
    """Weights, adapters and the cache."""

    def __init__(
        self,
        folder: Path,
        *,
        rows: int,
        prefill_tokens: int,
        context: int | None = None,
        dtype: str | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """`dtype` None: float32 on a CPU, the checkpoint's own on a GPU and of a quantized checkpoint. `context` None: the
        model's, at most 4096 tokens. `adapters`: PEFT folders by name.

        Raises UserError for what cannot be loaded, for models that do not run row by row, and for a cache larger than the memory.
        """
        self.device = "cuda" if hardware.has_cuda() else "cpu"
        self.model = _load(folder, dtype, self.device)
        config = self.model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.windows = _windows(config, folder)
        self.context = _context(config, context)
        self._adapters: dict[str | None, str] = {}
        if adapters:
            self._load_adapters(adapters)
        self.cache = RowCache(int(config.num_hidden_layers), rows, self.context + prefill_tokens)
        self._check(folder)

    @torch.inference_mode()
    def forward(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        adapters: Sequence[str | None],
        every: bool = False,
        seen: Sequence[tuple[list[int], torch.Tensor] | None] = (),
    ) -> torch.Tensor:
        """Logits [b, v] in fp32 after the last of each row's new `tokens`, which stand at `starts` and on in its cache; `every`:
        [b, s, v] after each of them, meaningless beyond a row's last. `seen`: for each row None, or places among its tokens and
        the embeddings that stand there in place of the tokens' own."""
        count, width = len(rows), max(map(len, tokens))
        padded = [token for row in tokens for token in (*row, *[0] * (width - len(row)))]
        given = torch.tensor([*padded, *starts, *rows], device=self.device)  # one copy to a GPU, which waits for each
        ids, begins, index = given[: count * width].view(count, width), given[-2 * count : -count], given[-count:]
        positions = begins[:, None] + torch.arange(width, device=self.device)
        length = max(start + len(row) for start, row in zip(starts, tokens, strict=True))
        self.cache.place.set(rows, index, positions, length)
        masks = {kind: attention.mask(positions, length, self.model.dtype, window) for kind, window in self.windows.items()}
        last = [len(row) - 1 for row in tokens]
        even, kept = min(last) == width - 1, sorted(set(last))
        more = {"adapter_names": [self._adapters[name] for name in adapters]} if self._adapters else {}
        logits = self.model(
            **self._inputs(ids, seen),
            position_ids=positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=self.cache,
            cache_position=torch.arange(width, device=self.device),
            use_cache=True,
            logits_to_keep=0 if every else 1 if even else torch.tensor(kept, device=self.device),  # 0 are all
            **more,
        ).logits
        if every:
            return logits.float()
        if even:
            return logits[:, 0].float()
        return logits[range(len(rows)), [kept.index(place) for place in last]].float()

    @property
    def base(self) -> torch.nn.Module:
        """transformers' model, without adapters."""
        return self.model.get_base_model() if self._adapters else self.model

    def _inputs(self, ids: torch.Tensor, seen: Sequence[tuple[list[int], torch.Tensor] | None]) -> dict[str, torch.Tensor]:
        """The tokens [b, s], or their embeddings [b, s, h] where a row has others."""
        if all(row is None for row in seen):
            return {"input_ids": ids}
        embedded = self.base.get_input_embeddings()(ids)
        for row, found in enumerate(seen):
            if found is not None:
                places, values = found
                embedded[row, places] = values.to(embedded.dtype)
        return {"inputs_embeds": embedded}

    def end_ids(self, tokenizer) -> frozenset[int]:
        """Tokens that end an answer: those of generation_config.json and the tokenizer's."""
        configured = self.model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
        return frozenset(token for token in ends if token is not None)

    def _load_adapters(self, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel

        self._adapters[None] = BASE
        for number, (name, folder) in enumerate(adapters.items()):
            inner = f"adapter{number}"  # a module's name, which has no dots
            try:
                if number == 0:
                    self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=inner)
                else:
                    self.model.load_adapter(folder, inner)
                self._adapters[name] = inner
                self.model.eval()(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.device), adapter_names=[inner])
            except Exception as error:  # the library raises many kinds
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise UserError(f"adapters: {name}: {folder} cannot be served: {lines[0]}") from error

    @torch.inference_mode()
    def _check(self, folder: Path) -> None:
        """Allocate the cache, and compare a prompt read through it in two pieces with the model's own way."""
        ids = [(7919 * i + 11) % self.vocabulary for i in range(PROBE)]
        more = {"adapter_names": [BASE]} if self._adapters else {}
        logits = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False, **more).logits[0, -1].float()
        half, decoder = PROBE // 2, self.base.get_decoder() if _sees(self.base.config) else self.base  # not of its tower
        if _softmax_only(decoder.config):
            decoder.set_attn_implementation(attention.register())
        try:
            self.forward([0], [ids[:half]], [0], [None])
            found = self.forward([0], [ids[half:]], [half], [None])[0]
        except (TypeError, AttributeError, NotImplementedError) as error:
            raise UserError(f"{folder}: {type(self.model).__name__} does not run from a cache of rows: {error}") from error
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if "memory" in str(error).lower():
                raise UserError(f"the cache of {self._shape()} does not fit: fewer rows= or a smaller context=") from None
            raise
        if self.device == "cpu" and self.cache.bytes > MEMORY_SHARE * hardware.detect().memory_bytes:
            raise UserError(f"the cache of {self._shape()} does not fit: fewer rows= or a smaller context=")
        off = float((found - logits).abs().max() / logits.abs().max())
        if not off < PROBE_TOLERANCE.get(self.model.dtype, 0.1):
            raise UserError(f"{folder}: {type(self.model).__name__} has other logits from a cache of rows (off by {off:.1e})")

    def _shape(self) -> str:
        return f"{self.cache.layers[0].rows} rows of {self.context:,} tokens, {self.cache.bytes / 1e9:.1f} GB,"


def _load(folder: Path, dtype: str | None, device: str):
    import transformers
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        quantized = getattr(config, "quantization_config", None) is not None
        kind = getattr(torch, dtype) if dtype else "auto" if device == "cuda" or quantized else torch.float32
        own = None if _softmax_only(config) else "eager"
        loader = getattr(transformers, CLASSES[config.model_type] if _sees(config) else "AutoModelForCausalLM")
        model, report = loader.from_pretrained(folder, dtype=kind, attn_implementation=own, output_loading_info=True)
    except Exception as error:  # the library raises many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{folder} cannot be loaded: {lines[0]}") from error
    if report["missing_keys"]:
        raise UserError(f"{folder} lacks {len(report['missing_keys'])} tensors, first {sorted(report['missing_keys'])[0]}")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UserError(f"{folder}: {type(model).__name__} does not run from a cache of rows")
    return model.eval().to(device)


def _sees(config) -> bool:
    """Whether it is a model with a tower that is served with images or sounds."""
    return config.model_type in CLASSES


def _softmax_only(config) -> bool:
    """Whether the model's attention is nothing but softmax; the library's eager one serves those with caps or sinks."""
    text = config.get_text_config()
    return not getattr(text, "attn_logit_softcapping", None) and text.model_type != "gpt_oss"


def _windows(config, folder: Path) -> dict[str, int | None]:
    """Kinds of attention masks that the model takes, and their windows in tokens."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"{folder}: layers of kind {sorted(other)[0]} do not run from a cache of rows")
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds:
        return {"full_attention": None, "sliding_attention": window}
    if kinds or not getattr(config, "use_sliding_window", True):
        return {"full_attention": None}
    return {"full_attention": window}


def _context(config, wanted: int | None) -> int:
    """Tokens of a row. RoPE that changes with the longest sequence of a batch is kept below the length where it does."""
    most = int(getattr(config, "max_position_embeddings", 0) or DEFAULT_CONTEXT)
    scaling = getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) in ("dynamic", "longrope"):
        original = getattr(config, "original_max_position_embeddings", None)
        most = int(original or scaling.get("original_max_position_embeddings") or most)
    if wanted is not None and not 1 <= wanted <= most:
        raise UserError(f"context={wanted} must be 1 to {most}, what the model was made for")
    return wanted or min(most, DEFAULT_CONTEXT)
