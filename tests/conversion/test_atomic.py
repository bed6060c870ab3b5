"""A folder is under its final name complete or not at all, and what was finished before a kill is there again."""

import errno
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conversion import atomic
from conversion.atomic import JOURNAL, fingerprint, new_folder, resumable_file, resumable_folder
from nemo_ext.errors import RunError, UserError


def test_it_appears_at_the_end(tmp_path):
    final = tmp_path / "deep" / "out"
    with new_folder(final) as folder:
        (folder / "x").write_text("1")
        assert not final.exists() and folder.parent == final.parent
    assert (final / "x").read_text() == "1"
    assert [p.name for p in final.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out"):  # an empty folder may be taken
        pass
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").exists()


def test_a_killed_process_leaves_no_final_name_and_is_cleaned_up(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from conversion.atomic import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'x').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env={"PYTHONPATH": ":".join(sys.path)})
    assert run.returncode == -9 and not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1  # the hidden remains
    with new_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), new_folder(tmp_path / "file" / "out"):
        pass


def write(unfinished, names: str) -> list[str]:
    """Write and finish what is not finished yet; return the names of those files."""
    written = []
    for name in names:
        file = unfinished.path / "weights" / name
        file.parent.mkdir(exist_ok=True)
        if not unfinished.finished(file):
            file.write_text(name * 10)
            unfinished.finish(file, letter=name)
            written.append(name)
    return written


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from conversion.atomic import resumable_folder
from test_atomic import write
with resumable_folder(Path(sys.argv[1]), "key") as unfinished:
    write(unfinished, "ab")
    (unfinished.path / "weights" / "c").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def killed(tmp_path) -> Path:
    """The final name of a folder whose writer was killed after finishing two files, in the third."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(Path(__file__).parent)]
    run = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    return tmp_path / "out"


def test_a_kill_costs_only_the_unfinished_file(killed):
    with resumable_folder(killed, "key") as unfinished:
        assert sorted(path.name for path in (unfinished.path / "weights").iterdir()) == ["a", "b"]
        assert unfinished.finished(unfinished.path / "weights" / "a")["letter"] == "a"
        assert write(unfinished, "abcd") == ["c", "d"]
    assert {path.name: path.read_text() for path in (killed / "weights").iterdir()} == {name: name * 10 for name in "abcd"}
    assert [path.name for path in killed.iterdir()] == ["weights"]
    assert [path.name for path in killed.parent.iterdir()] == ["out"]


def test_another_key_begins_anew(killed):
    with resumable_folder(killed, "other") as unfinished:
        assert [path.name for path in unfinished.path.iterdir()] == [JOURNAL]
        assert write(unfinished, "ab") == ["a", "b"]
    assert killed.is_dir()


def test_a_file_that_changed_since_is_written_again(killed):
    (killed.parent / ".out.unfinished" / "weights" / "a").write_text("x")
    with resumable_folder(killed, "key") as unfinished:
        assert write(unfinished, "ab") == ["a"]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_journal_that_was_cut_off(killed, cut):
    """The line that a kill cut off is lost, and what is added later is not."""
    journal = killed.parent / ".out.unfinished" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    with pytest.raises(KeyboardInterrupt), resumable_folder(killed, "key") as unfinished:
        assert write(unfinished, "abc")[-1] == "c"
        raise KeyboardInterrupt
    with resumable_folder(killed, "key") as unfinished:
        assert write(unfinished, "abc") == []


@pytest.mark.parametrize("error", [UserError("bad"), RunError("bad")])
def test_bad_input_leaves_nothing(killed, error):
    with pytest.raises(type(error), match="bad"), resumable_folder(killed, "key"):
        raise error
    assert list(killed.parent.iterdir()) == []


def test_an_error_that_is_not_about_the_files_keeps_them(killed):
    with pytest.raises(UserError), resumable_folder(killed, "key") as unfinished:
        unfinished.kept = True
        raise UserError("no memory to verify it")
    with resumable_folder(killed, "key") as unfinished:
        assert write(unfinished, "ab") == []


def test_a_full_disk_keeps_what_is_finished(killed):
    with pytest.raises(UserError, match="full: make space, the same command goes on") as error:
        with resumable_folder(killed, "key"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(error.value)
    with resumable_folder(killed, "key") as unfinished:
        assert write(unfinished, "ab") == []


def test_nothing_finished_nothing_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "out", "key"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_folder(tmp_path):
    with resumable_folder(tmp_path / "out", "key") as unfinished:
        write(unfinished, "a")
        for key in ("key", "other", ""):
            with pytest.raises(UserError, match="being written by another process"), resumable_folder(tmp_path / "out", key):
                pass
        assert (unfinished.path / "weights" / "a").is_file()
    assert (tmp_path / "out" / "weights" / "a").is_file()


def test_a_writer_that_comes_when_the_other_has_just_finished(tmp_path, monkeypatch):
    """Between its look at the final name and its lock the other renames: nothing is overwritten, nothing left."""
    lock = atomic._locked

    def slow(journal, final):
        (final / "mine").parent.mkdir()
        (final / "mine").write_text("1")
        return lock(journal, final)

    monkeypatch.setattr(atomic, "_locked", slow)
    with pytest.raises(UserError, match="exists already"), resumable_folder(tmp_path / "out", "key"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "mine").exists()


def test_a_file_that_changes_after_it_was_finished(tmp_path):
    with pytest.raises(UserError, match="changed while it was written"), resumable_folder(tmp_path / "out", "key") as unfinished:
        write(unfinished, "a")
        (unfinished.path / "weights" / "a").write_text("short")
    assert not (tmp_path / "out").exists()


def grown(final: Path, count: int, asked: list[int], die_after: int | None = None) -> list[int]:
    """Grow a file of a head and pieces of ten bytes, with a note in the journal every 25 bytes; return what `grow` yields."""

    def piece(number: int) -> bytes:
        asked.append(number)
        return str(number).encode() * 10

    seen = []
    with pytest.MonkeyPatch.context() as patch, resumable_file(final, "key") as unfinished:
        patch.setattr(atomic, "GROWTH", 25)
        file = unfinished.path / final.name
        pieces = (functools.partial(piece, number) for number in range(count))
        for done in unfinished.grow(file, lambda path: path.write_bytes(b"head"), pieces):
            seen.append(done)
            if done == die_after:
                raise KeyboardInterrupt
        unfinished.finish(file)
    return seen


def test_a_file_grows_on_where_it_was_noted(tmp_path):
    """Noted after piece 3 (34 bytes of 25) and 6; the two pieces after that are written again."""
    final, asked = tmp_path / "out.bin", []
    with pytest.raises(KeyboardInterrupt):
        grown(final, 9, asked, die_after=8)
    partial = tmp_path / ".out.bin.unfinished" / "out.bin"
    assert partial.stat().st_size == 84 and not final.exists()
    assert grown(final, 9, asked) == [6, 7, 8, 9]
    assert asked == [*range(8), 6, 7, 8]
    assert final.read_bytes() == b"head" + b"".join(str(n).encode() * 10 for n in range(9))
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]
    with pytest.raises(UserError, match="out.bin exists already"):
        grown(final, 9, asked)


@pytest.mark.parametrize("bytes_left", [63, 0, None])
def test_a_growing_file_that_lost_bytes_begins_anew(tmp_path, bytes_left):
    """64 are in the journal."""
    final, asked = tmp_path / "out.bin", []
    with pytest.raises(KeyboardInterrupt):
        grown(final, 9, asked, die_after=8)
    partial = tmp_path / ".out.bin.unfinished" / "out.bin"
    partial.unlink() if bytes_left is None else os.truncate(partial, bytes_left)
    assert grown(final, 9, asked) == [*range(1, 10)]
    assert final.stat().st_size == 94


def test_space(tmp_path, monkeypatch):
    with resumable_folder(tmp_path / "out", "key") as unfinished:
        write(unfinished, "a")
        sizes = {unfinished.path / "weights" / name: 2**30 for name in "abc"}
        monkeypatch.setattr(atomic, "free_bytes", lambda path: 2 * 2**30)
        unfinished.check_space(sizes)  # a is there
        monkeypatch.setattr(atomic, "free_bytes", lambda path: 2 * 2**30 - 1)
        with pytest.raises(
            UserError, match=r"needs 2.00 GiB besides the 1.00 GiB that are converted, its disk has 2.00 GiB free"
        ):
            unfinished.check_space(sizes)


def test_fingerprint(tmp_path):
    file = tmp_path / "x"
    file.write_text("1")
    first = fingerprint([file], "float32")
    assert fingerprint([file], "float32") == first != fingerprint([file], "bfloat16")
    os.utime(file, ns=(0, 0))
    assert fingerprint([file], "float32") != first
