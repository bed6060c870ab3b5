"""A folder is under its final name complete or not at all."""

import subprocess
import sys

import pytest

from conversion.atomic import new_folder
from nemo_ext.errors import UserError


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
