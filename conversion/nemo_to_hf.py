"""NeMo 2 checkpoint -> Hugging Face checkpoint, streaming: no model is built and no GPU is needed.

Takes what `conversion.nemo_folder.find` takes: a converted folder, a run, or one checkpoint of it, saved at any parallel layout.
Optimizer state is left out. A model that came from Hugging Face goes back as it came: config.json, files, order, dtypes.
"""

from __future__ import annotations

import collections
import functools
import importlib.metadata
import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from conversion import dist_checkpoint, dtypes, families, multimodal, nemo_folder, safetensors_io, shards
from conversion import workers as threads
from conversion.atomic import Unfinished, fingerprint, resumable_folder
from conversion.dist_checkpoint import SavedTensor
from conversion.families import Family, Row
from conversion.hf_to_nemo import BARE, KEY_PREFIX, Check, megatron_shape
from conversion.layout import VOCABULARY
from conversion.multimodal.rows import with_senses
from conversion.nemo_folder import NemoCheckpoint
from conversion.safetensors_io import TensorInfo
from conversion.shards import Shard, Specs
from conversion.workers import Progress
from nemo_ext.architecture import Architecture
from nemo_ext.errors import RunError, UserError

MAX_SHARD_BYTES = 5 * 10**9
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, eq=False)
class Piece:
    """One Megatron tensor (of one layer), and the names of the Hugging Face tensors that it holds."""

    row: Row
    index: dict[str, int]
    saved: SavedTensor
    copies: Mapping[str, str]  # {name: second name}, where the files have a tensor twice
    prefix: str = BARE  # of the Hugging Face names

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the Hugging Face tensors."""
        return self._named([families.shape(symbols, architecture) for symbols in self.row.hf.values()])

    def read(self, architecture: Architecture) -> dict[str, torch.Tensor]:
        """{name: tensor} of the Hugging Face tensors, in the stored dtype."""
        return self._named(self.row.layout.split(architecture, self.saved.read(*self.index.values())))

    def _named(self, parts: Sequence[Any]) -> dict[str, Any]:
        names = (families.hf_name(name, self.prefix).format(**self.index) for name in self.row.hf)
        named = dict(zip(names, parts, strict=True))
        return named | {copy: named[name] for name, copy in self.copies.items() if name in named}

    @property
    def position(self) -> tuple[int, int]:
        """Where it comes in the model: senses, embedding, layers, final norm and output."""
        if self.row.megatron.startswith("senses."):
            return -1, 0
        if "i" in self.index:
            return 1, self.index["i"]
        return (0 if self.row.megatron.startswith("embedding.") else 2), 0


def export(
    nemo: str | Path | NemoCheckpoint,
    hf_dir: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
    workers: int = 2,
    check: Check | None = None,
) -> Path:
    """Convert the NeMo checkpoint `nemo` into the Hugging Face folder `hf_dir` and return that.

    `dtype` is "float32", "bfloat16", "float16" or None: the dtype that each tensor had when it was imported, or the stored one.
    Without `max_shard_bytes` the files are those of the import, or of at most 5 GB. `progress(done, total, "B")` follows the
    writing, which `workers` threads share, each with one Megatron tensor (of one layer) in memory. A conversion that was killed
    goes on where it was.

    `hf_dir` then has config.json (the imported one as long as it describes the model), the weights as safetensors, the
    tokenizer with its chat template and generation_config.json, and a conversion.json with source and versions. It appears only
    when all is written, read back, and `check` has passed it. Raises UserError: no checkpoint, a corrupt or truncated one,
    tensors that do not fit architecture.json, values too large for `dtype`, too small a disk, `hf_dir` taken.
    """
    checkpoint = nemo if isinstance(nemo, NemoCheckpoint) else nemo_folder.find(nemo)
    architecture = checkpoint.architecture
    family = families.FAMILIES.get(architecture.family)
    if family is None:
        raise UserError(
            f"{checkpoint.folder} is a {architecture.family!r}, which does not convert; known: {', '.join(families.FAMILIES)}"
        )
    imported = _imported(checkpoint)
    family = with_senses(family, architecture, checkpoint.senses, imported.dtypes)
    prefix = families.base_prefix(family, imported.dtypes) if checkpoint.senses else BARE
    embedding, output = (families.hf_name(name, prefix) for name in (EMBEDDING, OUTPUT))
    copies = {embedding: output} if architecture.share_embeddings_and_output_weights and output in imported.dtypes else {}
    pieces = sorted(pieces_of(family, architecture, checkpoint, copies, prefix), key=lambda piece: piece.position)
    layout, specs, index_metadata = _plan(architecture, pieces, imported, dtypes.parse(dtype), max_shard_bytes)
    config = _config(checkpoint, family, specs, dtype)

    sources = [checkpoint.weights / ".metadata", *sorted({c.file for piece in pieces for c in piece.saved.chunks})]
    plan = [(shard.file, shard.metadata, [(name, specs[name]) for name in shard.tensors]) for shard in layout]
    with resumable_folder(hf_dir, fingerprint(sources, "nemo_to_hf", plan)) as unfinished:
        folder = unfinished.path
        _write(unfinished, architecture, pieces, layout, specs, progress, workers)
        if [shard.file for shard in layout] != [safetensors_io.SINGLE] or index_metadata:
            shards.write_index(folder, layout, specs, index_metadata)
        _check_written(folder, specs)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if checkpoint.tokenizer:
            for file in checkpoint.tokenizer.iterdir():
                shutil.copyfile(file, folder / file.name)
        record = {
            "source": str(checkpoint.folder.absolute()),
            "dtype": dtype,
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "safetensors")},
            "verified": False,
        }
        unfinished.kept = True
        if check:
            record["verified"] = check(folder)
        (folder / nemo_folder.RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return Path(hf_dir)


@dataclass(frozen=True)
class Imported:
    """The files that the model was imported from, as far as they were recorded."""

    layout: list[Shard] = field(default_factory=list)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    index_metadata: Mapping[str, Any] | None = None


def _imported(checkpoint: NemoCheckpoint) -> Imported:
    recorded = checkpoint.record.get("hf_files")
    try:
        return Imported(*shards.restore(recorded), recorded["index_metadata"]) if recorded else Imported()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint.folder}: its {nemo_folder.RECORD} cannot be read: {error!r}") from error


def pieces_of(
    family: Family,
    architecture: Architecture,
    checkpoint: NemoCheckpoint,
    copies: Mapping[str, str],
    prefix: str = BARE,
) -> Iterator[Piece]:
    """Every Megatron tensor of the checkpoint; refuses one that is missing, unexpected or ill-shaped."""
    saved = dist_checkpoint.read(checkpoint.weights)
    rows = family.rows_of(architecture)
    keys = {KEY_PREFIX + row.key for row in rows}
    if missing := sorted(keys - set(saved)):
        raise UserError(f"{checkpoint.folder} lacks {len(missing)} of its {len(keys)} tensors, first {missing[0]}")
    if unexpected := sorted(key for key in saved if key not in keys and not key.endswith("._extra_state")):
        what = "an adapter (convert it with from=lora:)" if any(".adapter." in key for key in unexpected) else unexpected[0]
        raise UserError(f"{checkpoint.folder} has tensors that a {family.name} of its architecture.json has not: {what}")
    for row in rows:
        tensor, axes, shape = (
            saved[KEY_PREFIX + row.key],
            tuple(row.axes(architecture).values()),
            megatron_shape(row, architecture),
        )
        found = tensor.shape[len(axes) :]
        padded = row.layout is VOCABULARY and found[1:] == shape[1:] and found[0] >= architecture.vocab_size  # to any multiple
        if tensor.shape[: len(axes)] != axes or (found != shape and not padded):
            raise UserError(
                f"{checkpoint.folder}: {KEY_PREFIX + row.key} has shape {list(tensor.shape)}, architecture.json asks for "
                f"{[*axes, *shape]}"
            )
        yield from (Piece(row, index, tensor, copies, prefix) for index in row.indices(architecture))


def _plan(
    architecture: Architecture, pieces: Sequence[Piece], imported: Imported, dtype: torch.dtype | None, max_bytes: int | None
) -> tuple[list[Shard], Specs, Mapping[str, Any] | None]:
    """The files, {name: (dtype, shape)} of their tensors, and the index's metadata where it is known."""
    shapes = {name: (piece, shape) for piece in pieces for name, shape in piece.shapes(architecture).items()}
    original = imported.dtypes if set(imported.dtypes) == set(shapes) else {}  # else the model has changed since
    specs = {name: (dtype or original.get(name, piece.saved.dtype), shape) for name, (piece, shape) in shapes.items()}
    if max_bytes or not original:
        return shards.lay_out(specs, max_bytes or MAX_SHARD_BYTES), specs, None
    metadata = imported.index_metadata
    if metadata and "total_size" in metadata and any(specs[name][0] != original[name] for name in specs):
        metadata = {**metadata, "total_size": sum(map(shards.nbytes, specs.values()))}
    return imported.layout, specs, metadata


def _config(checkpoint: NemoCheckpoint, family: Family, specs: Specs, dtype: str | None) -> dict[str, Any]:
    """config.json: the imported one as long as it describes the model, of a wrapped language model its text part."""
    usual = dtypes.NAMES[collections.Counter(kind for kind, _ in specs.values()).most_common(1)[0][0]]
    config = checkpoint.record.get("hf_config")
    if not config or not _describes(config, checkpoint):
        text = families.hf_config(checkpoint.architecture, usual, _special_ids(checkpoint.tokenizer))
        return multimodal.hf_config(text, checkpoint.senses, usual) if checkpoint.senses else text
    if family.text_config and "text_config" in config and not checkpoint.senses:
        outside = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
        text = {key: config[key] for key in outside if key in config} | config["text_config"]
        config = {"architectures": [family.causal_lm], **text, "model_type": family.model_types[0]}
    if dtype or checkpoint.record.get("dtype"):
        config = config | {"dtype" if "dtype" in config else "torch_dtype": usual}
    return config


def _describes(config: Mapping[str, Any], checkpoint: NemoCheckpoint) -> bool:
    try:
        return families.architecture(config) == checkpoint.architecture and multimodal.senses_of(config) == checkpoint.senses
    except UserError:
        return False


def _special_ids(tokenizer: Path | None) -> dict[str, int | None]:
    """Ids of the tokenizer's bos, eos and pad tokens."""
    if tokenizer is None or not (tokenizer / "tokenizer.json").is_file() or not (tokenizer / "tokenizer_config.json").is_file():
        return {}
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    tokens = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: ids.token_to_id(token) for name, token in tokens.items() if token is not None}


def _write(
    unfinished: Unfinished,
    architecture: Architecture,
    pieces: Sequence[Piece],
    layout: Sequence[Shard],
    specs: Specs,
    progress: Progress | None,
    workers: int,
) -> None:
    """Write the tensors into their files. A Megatron tensor is read once, also if its parts lie in several files."""
    sizes = {unfinished.path / shard.file: sum(shards.nbytes(specs[name]) for name in shard.tensors) for shard in layout}
    unfinished.check_space(sizes)
    places: dict[str, TensorInfo] = {}
    for shard in layout:
        file = unfinished.path / shard.file
        if not unfinished.finished(file):
            places |= safetensors_io.create(file, {name: specs[name] for name in shard.tensors}, shard.metadata)
    left = collections.Counter(place.file for place in places.values())  # tensors that a file lacks
    counting = threading.Lock()

    def write_piece(piece: Piece) -> Iterator[int]:
        for name, tensor in piece.read(architecture).items():
            if name not in places:
                continue
            place = places[name]
            place.write(dtypes.cast(tensor, place.dtype, name))
            with counting:
                left[place.file] -= 1
                last = not left[place.file]
            if last:
                unfinished.finish(place.file)
            yield place.nbytes

    order = {name: number for number, name in enumerate(places)}  # so that one file after another is finished
    first = {piece: min((order[n] for n in piece.shapes(architecture) if n in order), default=None) for piece in pieces}
    jobs = [functools.partial(write_piece, piece) for piece in sorted((p for p in pieces if first[p] is not None), key=first.get)]
    threads.run(
        jobs, workers, sum(sizes.values()), sum(size for file, size in sizes.items() if unfinished.finished(file)), progress
    )


def _check_written(folder: Path, specs: Specs) -> None:
    """Read the headers back."""
    if {name: (info.dtype, info.shape) for name, info in safetensors_io.open_folder(folder).items()} != dict(specs):
        raise RunError(f"{folder} does not read back as it was written")
