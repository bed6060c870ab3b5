"""One line for whatever ends a run."""

import errno

import pytest

from nemo_ext import errors


def chained(cause: BaseException, text: str = "write failed on rank 0\nTraceback (most recent call last)") -> BaseException:
    try:
        raise RuntimeError(text) from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/run/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        chained(OSError(errno.ENOSPC, "No space left on device")),
        RuntimeError("CheckpointException ranks:dict_keys([0])\n...OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_in_many_words(error, tmp_path):
    assert errors.explain(error, tmp_path).startswith(f"the disk is full: {tmp_path}: make space")


def test_a_writer_that_fails_is_a_full_disk_only_if_the_disk_is_full(tmp_path, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert errors.explain(error, tmp_path).startswith("RuntimeError: [enforce fail")
    monkeypatch.setattr(errors, "free_bytes", lambda folder: 0)
    assert errors.explain(error, tmp_path).startswith("the disk is full")


def test_other_errors_are_their_first_line(tmp_path):
    assert errors.explain(errors.UserError("lr=x is wrong\n\nFiddle context: ..."), tmp_path) == "lr=x is wrong"
    assert errors.explain(PermissionError(errno.EACCES, "Permission denied", "/a"), tmp_path) == "Permission denied: /a"
    assert errors.explain(ValueError("\n  first\nsecond"), tmp_path) == "ValueError: first"
    assert errors.explain(KeyError(), tmp_path) == "KeyError"


def test_what_ranks_say_when_another_is_gone():
    gone = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2345")
    assert errors.is_lost_connection(gone) and errors.is_lost_connection(chained(gone))
    assert not errors.is_lost_connection(RuntimeError("shape mismatch"))


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    assert errors.free_bytes(tmp_path / "a" / "b") > 0
