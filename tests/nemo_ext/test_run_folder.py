"""The files of a run's folder: replaced whole, appended by the line, read while half-written."""

import json

import pytest

from nemo_ext import run_folder


def test_read_records_sorts_keeps_last_and_passes_over_broken_lines(tmp_path):
    lines = [
        '{"step": 2, "loss": 2.0}',
        '{"step": 1, "loss": 1.0}',
        "not json",
        "[1, 2]",
        '{"loss": 5.0}',
        '{"step": 2, "loss": 2.5}',
        '{"step": 0, "val_loss": 3.0}',
        '{"step": 2, "val_loss": NaN}',
        '{"step": 3, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    steps, validations = run_folder.read_records(tmp_path)
    assert steps == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]
    assert [v["step"] for v in validations] == [0, 2]
    assert run_folder.read_records(tmp_path / "nowhere") == ([], [])


def test_truncate_drops_later_steps_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "val_loss": 3.0}, *({"step": s, "loss": float(s)} for s in range(1, 6)), {"step": 5, "val_loss": 2.0}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 3, "lo')
    kept = run_folder.truncate_records(tmp_path, 3)
    assert kept == records[:4]
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:4]
    assert run_folder.truncate_records(tmp_path / "nowhere", 3) == []


def test_truncate_leaves_an_unchanged_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n')
    before = path.stat().st_ino
    run_folder.truncate_records(tmp_path, 1)
    assert path.stat().st_ino == before


def test_tail_gives_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = run_folder.Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    assert tail.read() == [{"step": 1}]
    assert tail.read() == []
    with open(path, "ab") as file:
        file.write(b'}\n{"step": 3}\n')
    assert tail.read() == [{"step": 2}, {"step": 3}]
    path.write_bytes(b'{"step": 9}\n')  # rewritten, shorter
    assert tail.read() == [{"step": 9}]


def test_status_round_trip(tmp_path):
    assert run_folder.read_status(tmp_path) is None
    run_folder.write_status(tmp_path, "training", 3, 10, "hello", started=1.5)
    status = run_folder.read_status(tmp_path)
    assert status.pop("time") > 1.7e9
    assert status == {"phase": "training", "step": 3, "max_steps": 10, "message": "hello", "started": 1.5}
    with pytest.raises(ValueError, match="sleeping"):
        run_folder.write_status(tmp_path, "sleeping")


def test_json_has_no_nan(tmp_path):
    value = {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -float("inf"), "e": "x"}}
    run_folder.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": None, "e": "x"}}


def test_the_first_failure_is_the_one_that_is_told(tmp_path):
    run_folder.write_status(tmp_path, "starting", 0, 10)
    run_folder.write_failure(tmp_path, "the disk is full", 1, step=3)
    run_folder.write_failure(tmp_path, "a rank is gone", 2)
    status = run_folder.read_status(tmp_path)
    assert (status["phase"], status["message"], status["exit_code"], status["step"]) == ("failed", "the disk is full", 1, 3)


def checkpoint(folder, step: int):
    path = folder / f"step-{step:06d}"
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "part").write_bytes(b"x" * step)
    run_folder.write_manifest(path)
    return path


def test_checkpoints_by_step_without_what_is_partial_or_damaged(tmp_path):
    for step in (200, 1_000_000, 30):
        checkpoint(tmp_path, step)
    (tmp_path / "step-000300.partial").mkdir()
    (tmp_path / "step-000400.damaged").mkdir()
    assert [step for step, _ in run_folder.checkpoints(tmp_path)] == [30, 200, 1_000_000]
    assert run_folder.newest_checkpoint(tmp_path) == (1_000_000, tmp_path / "step-1000000")
    assert run_folder.newest_checkpoint(tmp_path / "nowhere") is None
    run_folder.clear_partial(tmp_path)
    assert not (tmp_path / "step-000300.partial").exists() and (tmp_path / "step-000400.damaged").exists()


def test_damage_is_found_by_size(tmp_path):
    path = checkpoint(tmp_path, 8)
    assert run_folder.damage(path) is None
    (path / "weights" / "part").write_bytes(b"1234")
    assert run_folder.damage(path) == "weights/part has 4 bytes and not 8"
    (path / "weights" / "part").unlink()
    assert run_folder.damage(path) == "weights/part: No such file or directory"
    (path / run_folder.MANIFEST).write_text("{")
    assert run_folder.damage(path) == "files.json is not readable"
    (path / run_folder.MANIFEST).unlink()  # of an earlier version: nothing is known
    assert run_folder.damage(path) is None


def test_a_kill_while_deleting_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 8)
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda folder: (folder / "weights" / "part").unlink())  # and no further
    run_folder.remove_checkpoint(path)
    assert run_folder.checkpoints(tmp_path) == [] and (tmp_path / "step-000008.partial").exists()


def test_peak_memory_is_the_fullest_ranks(tmp_path):
    assert run_folder.peak_memory(tmp_path) is None
    for rank, peak in enumerate((5, 9, 7)):
        run_folder.write_json(run_folder.rank_memory(tmp_path, rank), {"peak": peak})
    assert run_folder.peak_memory(tmp_path) == 9
