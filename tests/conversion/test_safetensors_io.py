"""Our reader and writer against the safetensors package, and files that are not what they say."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import safetensors_io
from nemo_ext.errors import UserError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.zeros(0, 4),
    "d": torch.tensor(3.0, dtype=torch.float16),
}


def test_reads_what_the_package_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = safetensors_io.open_folder(tmp_path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        back = found[name].read()
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def test_the_package_reads_what_we_write(tmp_path):
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    safetensors_io.write_file(tmp_path / "x.safetensors", specs, iter(TENSORS.values()))
    back = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_a_tensor_other_than_announced_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        safetensors_io.write_file(tmp_path / "x", {"a": (torch.float32, (2,))}, [torch.zeros(3)])


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_anywhere(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated") as error:
        safetensors_io.open_folder(tmp_path)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_corrupt_header(tmp_path):
    file = tmp_path / "model.safetensors"
    for header in (b"{not json", b"[]", json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()):
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        with pytest.raises(UserError, match="corrupt|bytes but its shape"):
            safetensors_io.open_folder(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "F32", "data_offsets": [0, 4]},
        [],
        7,
    ],
)
def test_entries_that_make_no_sense(tmp_path, entry):
    file = tmp_path / "model.safetensors"
    header = json.dumps({"a": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(UserError, match="tensor a"):
        safetensors_io.open_folder(tmp_path)


def test_tensors_written_in_any_order_give_the_packages_file(tmp_path):
    """Byte for byte, metadata and names beyond ASCII included."""
    tensors = {"é.weight": torch.arange(4.0), "b": torch.ones(2, 3).bfloat16(), "a": torch.zeros(3).bfloat16()}
    metadata = {"format": "pt", "note": "ü"}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    order = sorted(safetensors_io.read_header(tmp_path / "theirs.safetensors").items(), key=lambda item: item[1].offset)
    places = safetensors_io.create(tmp_path / "ours.safetensors", {name: (info.dtype, info.shape) for name, info in order})
    for name in ("a", "é.weight", "b"):
        places[name].write(tensors[name])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    for given in (metadata, None):
        safetensors_io.create(tmp_path / "x.safetensors", {"a": (torch.float32, (1,))}, given)
        assert safetensors_io.read_metadata(tmp_path / "x.safetensors") == given


def test_shards(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert set(safetensors_io.open_folder(tmp_path)) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))
    with pytest.raises(UserError, match="lacks tensor c"):
        safetensors_io.open_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}}))
    with pytest.raises(UserError, match="lacks 1 of its 2 shards, first three.safetensors"):
        safetensors_io.open_folder(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="not a safetensors index"):
        safetensors_io.open_folder(tmp_path)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model.safetensors"):
        safetensors_io.open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors first"):
        safetensors_io.open_folder(tmp_path)
