"""The reader of Megatron's format against torch's own, over any cutting into chunks, and files that are not what they say."""

import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from conversion import dist_checkpoint
from conversion.dist_checkpoint import Chunk, StoredTensor
from nemo_ext.errors import UserError


def cut(tensor: torch.Tensor, seed: int) -> StoredTensor:
    """The tensor in chunks of random sizes, in random order, as no layout would cut it."""
    rng = random.Random(seed)
    regions = [([0] * tensor.dim(), list(tensor.shape))]
    for _ in range(6):
        offset, shape = regions.pop(rng.randrange(len(regions)))
        axis = rng.randrange(tensor.dim())
        at = rng.randint(1, shape[axis]) if shape[axis] > 1 else shape[axis]
        rest = shape[axis] - at
        regions.append((offset, [*shape[:axis], at, *shape[axis + 1 :]]))
        if rest:
            regions.append(([*offset[:axis], offset[axis] + at, *offset[axis + 1 :]], [*shape[:axis], rest, *shape[axis + 1 :]]))
    rng.shuffle(regions)

    def chunk(offset, shape):
        part = tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        return Chunk(tuple(offset), tuple(shape), lambda: part)

    return StoredTensor(tuple(tensor.shape), tensor.dtype, [chunk(*region) for region in regions])


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "module.layers.weight": torch.randn(5, 7, 6),
        "module.experts.weight": torch.randn(3, 4, 5, 2).bfloat16(),
        "module.norm": torch.randn(9).half(),
        "optimizer.state.exp_avg.module.norm": torch.randn(9),
    }


@pytest.fixture
def folder(tensors, tmp_path) -> Path:
    stored = {key: cut(tensor, seed) for seed, (key, tensor) in enumerate(tensors.items())}
    dist_checkpoint.write(tmp_path / "weights", stored, {"module._extra_state/shard_0_1": torch.empty(0)})
    return tmp_path / "weights"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        for tensor in dist_checkpoint.read(folder).values():
            tensor.read()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("seed", range(5))
def test_any_cutting_reads_back_whole_and_in_parts(tmp_path, seed):
    torch.manual_seed(seed)
    tensor = torch.randn(4, 3, 5)
    dist_checkpoint.write(tmp_path / "weights", {"module.x": cut(tensor, seed)}, {})
    saved = dist_checkpoint.read(tmp_path / "weights")["module.x"]
    assert (saved.shape, saved.dtype) == ((4, 3, 5), torch.float32) and len(saved.chunks) > 1
    assert torch.equal(saved.read(), tensor)
    assert all(torch.equal(saved.read(i), tensor[i]) for i in range(4))
    assert all(torch.equal(saved.read(i, j), tensor[i, j]) for i in range(4) for j in range(3))


def test_keys_dtypes_and_values(folder, tensors):
    found = dist_checkpoint.read(folder)
    assert set(found) == {key for key in tensors if not key.startswith("optimizer.")}
    for key, saved in found.items():
        assert saved.dtype == tensors[key].dtype and torch.equal(saved.read(), tensors[key])


def test_torchs_own_reader_agrees(folder, tensors):
    state = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_only_the_chunks_that_overlap_are_read(tmp_path):
    parts = [torch.full((1, 3), float(i)) for i in range(8)]
    chunks = [Chunk((i, 0), (1, 3), lambda part=part: part) for i, part in enumerate(parts)]
    dist_checkpoint.write(tmp_path / "weights", {"module.x": StoredTensor((8, 3), torch.float32, chunks)}, {})
    saved = dist_checkpoint.read(tmp_path / "weights")["module.x"]
    for chunk in saved.chunks:
        if chunk.offset[0] != 5:
            chunk.file.unlink(missing_ok=True)
    assert torch.equal(saved.read(5), parts[5][0])
    with pytest.raises(UserError, match="cannot read"):
        saved.read(4)


def test_a_pickle_that_would_run_something_is_not_run(folder):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harm"),)

    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Harmful()}))
    with pytest.raises(UserError, match=r"names posix\.mkdir, which is no metadata"):
        dist_checkpoint.read(folder)
    assert not (folder / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"hello", pickle.dumps([1]), pickle.dumps(None)])
def test_corrupt_metadata(folder, content):
    (folder / ".metadata").write_bytes(content)
    refused(folder, "corrupt")


def test_metadata_cut_anywhere(folder):
    content = (folder / ".metadata").read_bytes()
    for length in range(1, len(content) - 1, 97):
        (folder / ".metadata").write_bytes(content[:length])
        refused(folder, "corrupt")


def test_missing_metadata(folder):
    (folder / ".metadata").unlink()
    refused(folder, "cannot read")


def test_truncated_and_missing_files(folder):
    file = folder / "__0_1.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    refused(folder, "truncated")
    file.unlink()
    refused(folder, "cannot read .*distcp")


def test_a_record_that_is_no_tensor(folder):
    file = folder / "__0_1.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    refused(folder, "is corrupt at byte")


def edit(folder: Path, change) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    change(metadata)
    metadata.storage_meta = None
    with open(folder / ".metadata", "wb") as stream:
        pickle.dump(metadata, stream)


def test_chunks_that_leave_a_hole(folder):
    edit(folder, lambda metadata: metadata.state_dict_metadata["module.norm"].chunks.pop())
    refused(folder, "module.norm do not cover")


def test_a_file_outside_the_folder(folder):
    def change(metadata):
        next(iter(metadata.storage_data.values())).relative_path = "../other.distcp"

    edit(folder, change)
    refused(folder, "outside its folder")


def test_another_format(folder):
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    refused(folder, "is a zarr checkpoint; only torch_dist")
    (folder / "metadata.json").unlink()
    refused(folder, "no Megatron checkpoint")
