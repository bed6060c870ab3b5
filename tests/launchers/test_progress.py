"""The launcher's view of a run, from the files that a synthetic run writes."""

import io
import json
import re
import subprocess
import sys
import textwrap
import time

import pytest
from rich.console import Console

from launchers import progress
from nemo_ext import run_folder

# Writes what workers write: status and metrics of `steps` steps after step `first`, a validation before and after.
WORKER = textwrap.dedent(
    """
    import json, sys, time
    from nemo_ext import run_folder

    run_dir, first, last, code = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    time.sleep(0.2)
    kept = run_folder.truncate_records(run_dir, first)
    started = time.time()

    def status(phase, step, message=""):
        run_folder.write_status(run_dir, phase, step, last, message, started=started)

    def write(**record):
        with open(run_dir + "/metrics.jsonl", "a") as file:
            file.write(json.dumps({**record, "time": time.time()}) + "\\n")

    status("evaluating", first)
    if not first:
        write(step=0, val_loss=3.0, val_ppl=20.0855)
    status("training", first)
    for step in range(first + 1, last + 1):
        time.sleep(0.02)
        write(step=step, loss=3.0 - step / 100, lr=1e-4, tokens_per_s=12345.6, tflops=1.5, step_time=60.0)
    write(step=last, val_loss=2.5, val_ppl=12.1825)
    time.sleep(0.5)
    status(*(("failed", last, "loss is nan at step 40") if code else ("finished", last)))
    sys.exit(code)
    """
)


def run(run_dir, first: int, last: int, code: int = 0, terminal: bool = False, width: int = 200) -> tuple[int, str]:
    """Follow a synthetic run; its exit code and what was shown."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    command = [sys.executable, "-c", WORKER, str(run_dir), str(first), str(last), str(code)]
    process = subprocess.Popen(command)
    try:
        return progress.follow(run_dir, process, console), text.getvalue()
    finally:
        process.kill()


def test_plain_lines(tmp_path):
    code, text = run(tmp_path, 0, 40)
    lines = [re.sub(r"^\[\d+:\d\d\] ", "", line) for line in text.splitlines()]
    assert code == 0
    assert len(lines) == len(text.splitlines()) and all(re.match(r"\[\d+:\d\d\] ", line) for line in text.splitlines())
    assert "held-out loss 3.0000, perplexity 20.09 at step 0" in lines
    assert "held-out loss 2.5000, perplexity 12.18 at step 40" in lines
    assert lines.index("training") < lines.index("finished") and lines[-1] == "finished"
    steps = [line for line in lines if line.startswith("step ")]
    assert 2 <= len(steps) <= 11  # the first, and at most one for each tenth
    assert steps[-1].startswith("step 40/40  loss 2.6000  held-out 2.5000  12,346 tokens/s  1.5 TFLOP/s  ETA 0:00")


def test_resumed_run_shows_only_this_start(tmp_path):
    old = [
        {"step": 0, "val_loss": 9.0, "time": 1.0},
        *({"step": s, "loss": 9.0, "step_time": 1e6, "time": 1.0} for s in range(1, 35)),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old) + '{"step": 35, "lo')
    run_folder.write_status(tmp_path, "stopped", 34, 40, "of the start before", started=1.0)
    _, text = run(tmp_path, 30, 40)
    assert "9.0" not in text and "start before" not in text and "stopped" not in text
    etas = re.findall(r"step (\d+)/40 .* ETA (\S+)", text)
    assert etas and all(eta == f"{40 - int(step)}:00" for step, eta in etas)  # 60 s a step, in this start
    steps, _ = run_folder.read_records(tmp_path)
    assert [r["step"] for r in steps] == list(range(1, 41))


def test_failure_is_said_and_the_exit_code_returned(tmp_path):
    code, text = run(tmp_path, 0, 3, code=7)
    assert code == 7
    assert text.splitlines()[-1].endswith("failed: loss is nan at step 40")


def test_process_that_dies_before_it_writes(tmp_path):
    text = io.StringIO()
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert progress.follow(tmp_path, process, Console(file=text)) == 3
    assert text.getvalue() == "[0:00] starting\n"


def test_bar_on_a_terminal(tmp_path):
    code, text = run(tmp_path, 0, 20, terminal=True)
    assert code == 0
    assert "20/20" in text and "loss 2.8000" in text and "12,346 tokens/s" in text and "1.5 TFLOP/s" in text
    assert "held-out 2.5000" in text and "ETA 0:00" in text and "finished" in text and "\x1b[" in text


def test_bar_on_a_narrow_terminal_keeps_what_matters(tmp_path):
    _, text = run(tmp_path, 0, 20, terminal=True, width=80)
    assert "20/20 loss 2.8000  12,346 tokens/s  1.5 TFLOP/s  ETA 0:00" in text and "…" not in text.splitlines()[-2]


@pytest.mark.parametrize(
    ("eta", "passed", "due"), [(100, 9, False), (100, 11, True), (5000, 99, False), (5000, 101, True), (1e6, 301, True)]
)
def test_lines_get_rarer_in_long_runs(eta, passed, due):
    class Run:
        step, max_steps = 1, 1000

    Run.eta = eta
    view = progress._LineView(Console(file=io.StringIO()))
    view._last_line = time.monotonic() - passed
    assert view._due(Run) is due


def test_a_loss_that_is_no_number(tmp_path):
    run_folder.write_status(tmp_path, "training", 0, 10, started=1.0)
    state = progress._Run(tmp_path)
    state._stale = None
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 4, "loss": null, "tokens_per_s": 10.0, "tflops": 0.1, "step_time": 2.0, "time": 2.0}\n'
    )
    state.read()
    assert state.figures() == "loss nan  10 tokens/s  0.1 TFLOP/s  ETA 0:12"


def test_needs_no_torch():
    code = "import sys, launchers.progress; assert not {'torch', 'nemo', 'lightning', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
