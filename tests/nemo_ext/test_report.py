"""summary.json, summary.md and the plots, against figures computed by hand."""

import json
import math
import struct

import pytest

from nemo_ext import report

SPEEDS = [10.0, 50.0, 100.0, 300.0, 200.0, 120.0]  # after the first two: 100, 120, 200, 300 with median 160


def step(number: int, loss: float, speed: float) -> dict:
    return {
        "step": number, "loss": loss, "lr": 1e-5 * number, "grad_norm": 1.0 + number, "tokens_per_s": speed,
        "tflops": speed / 1000, "memory": 1.0 + number / 10, "step_time": 2.0, "tokens": 64 * number, "time": 1000.0 + 2 * number,
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    records = [{"step": 0, "val_loss": 3.0, "val_ppl": math.exp(3.0), "time": 999.0}]
    records += [step(n + 1, 3.0 - 0.1 * n, speed) for n, speed in enumerate(SPEEDS)]
    records += [
        {"step": 3, "val_loss": 2.5, "time": 1007.0},
        {"step": 6, "val_loss": 2.0, "val_ppl": math.exp(2.0), "time": 1015.0},
    ]
    text = "".join(json.dumps(r) + "\n" for r in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 7, "loss": 1')  # killed while writing
    (tmp_path / "config.yaml").write_text("steps: 6\n")
    return tmp_path


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height from the IHDR chunk (PNG specification, 11.2.2)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    return struct.unpack(">II", data[16:24])


def test_summary_figures(run_dir):
    facts = {
        "layout": {"tp": 2, "pp": 1, "dp": 1},
        "resumed_from_step": 3,
        "checkpoint": "/ck/6",
        "recipe": "cpt_llama3 size=smoke",
    }
    summary = report.write(run_dir, facts)
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    expected = {
        "val_loss_before": 3.0, "val_loss_after": 2.0, "val_ppl_before": math.exp(3), "val_ppl_after": math.exp(2), "steps": 6,
        "tokens": 384, "tokens_per_s": 160.0, "tflops": 0.16, "memory": 1.6, "wall_time": 1015.0 - 999.0, "resumed_from_step": 3,
        "train_loss_first": 3.0, "train_loss_last": 2.5,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    assert {key: summary[key] for key in facts} == facts
    assert summary["paths"]["checkpoint"] == "/ck/6"


def test_markdown_and_plots(run_dir):
    facts = {
        "layout": {"tp": 2, "pp": 1},
        "train_tokens": 56789,
        "heldout_tokens": 1234,
        "parameters": 134_515_008,
        "planned_memory": 2.0,
    }
    report.write(run_dir, {**facts, "parameters": 134_515_008})
    text = (run_dir / "summary.md").read_text()
    assert "| held-out loss (nats per token) | 3.0000 | 2.0000 |" in text
    assert "| held-out perplexity | 20.09 | 7.39 |" in text
    assert "TP 2, PP 1" in text and "56,789 tokens for training, 1,234 held out" in text and "134.5 M parameters" in text
    assert "160 tokens/s, 0.16 TFLOP/s a device, 1.60 GiB peak (2.00 planned)" in text
    assert "[config.yaml](config.yaml)" in text and "[logs](logs)" not in text  # only what exists
    for name in ("loss", "val_loss", "lr", "grad_norm", "throughput"):
        assert f"](plots/{name}.png)" in text
        assert png_size((run_dir / "plots" / f"{name}.png").read_bytes()) == (840, 480)
    assert not [p for p in run_dir.rglob("*.tmp")]


def test_terminal_lines(run_dir):
    lines = report.terminal_lines(report.write(run_dir, {"layout": {"tp": 1, "dp": 2}, "wall_time": 125.0}))
    assert lines[0] == "held-out     loss 3.0000 -> 2.0000, perplexity 20.09 -> 7.39"
    assert lines[1] == "training     loss 3.0000 -> 2.5000"
    assert lines[2] == "steps        6 (384 tokens) in 2:05"
    assert lines[3] == "speed        160 tokens/s, 0.16 TFLOP/s a device, 1.60 GiB peak"
    assert lines[4] == "layout       TP 1, DP 2"


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_no_records(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    summary = report.write(tmp_path, {})
    assert summary["steps"] == summary["tokens"] == 0
    assert summary["val_loss_before"] is summary["val_ppl_after"] is summary["tokens_per_s"] is None
    assert summary["paths"]["plots"] == []
    assert report.terminal_lines(summary)


def test_missing_validation_nan_and_overflow(tmp_path):
    records = [step(1, 2.0, 10.0), {**step(2, float("nan"), 20.0), "grad_norm": None}]
    records += [{"step": 2, "val_loss": 800.0, "val_ppl": None, "time": 1.0}]  # exp(800) is no float
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = report.write(tmp_path, {})
    assert summary["val_loss_before"] is None and summary["val_loss_after"] == 800.0 and summary["val_ppl_after"] is None
    assert summary["train_loss_last"] == 2.0  # the last that is a number
    assert summary["tokens_per_s"] == 15.0  # two steps only: both count
    assert "not measured" in (tmp_path / "summary.md").read_text()
    assert (
        report.terminal_lines(summary)[0] == "held-out     loss not measured -> 800.0000, perplexity not measured -> not measured"
    )


def test_validation_before_training_only_is_not_an_after(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 3.0, "time": 1.0}\n')
    summary = report.write(tmp_path, {})
    assert summary["val_loss_before"] == 3.0 and summary["val_loss_after"] is None


def test_plots_of_an_earlier_start_do_not_stay(run_dir):
    report.write(run_dir, {})
    lines = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "val_loss" not in line]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    assert "plots/val_loss.png" not in report.write(run_dir, {})["paths"]["plots"]
    assert not (run_dir / "plots" / "val_loss.png").exists()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (3600 * 3 + 245, "3:04:05")])
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ({"tp": 2, "pp": 1, "vp": None, "cp": 1, "dp": 4}, "TP 2, PP 1, DP 4"),
        (
            {"tp": 2, "pp": 4, "vp": 2, "cp": 2, "dp": 1, "sequence_parallel": True, "micro_batch": 1, "num_microbatches": 8},
            "TP 2, PP 4, VP 2, CP 2, DP 1, sequence parallel",
        ),
        ({"tp": 1, "pp": 1, "dp": 1, "sequence_parallel": False, "recompute": "none"}, "TP 1, PP 1, DP 1"),
        ({"tp": 1, "pp": 1, "dp": 1, "recompute": "full"}, "TP 1, PP 1, DP 1, full recomputation"),
        ("data parallel", "data parallel"),
    ],
)
def test_layout_text(layout, text):
    assert report.layout_text(layout) == text


def test_batch_text():
    assert report.batch_text({"micro_batch": 1, "num_microbatches": 8}) == "8 micro-batches of 1 sequence"
    assert report.batch_text({"micro_batch": 4, "num_microbatches": 1}) == "1 micro-batch of 4 sequences"


@pytest.mark.parametrize(("tflops", "text"), [(412.3, "412 T"), (1.5, "1.5 T"), (0.1, "0.1 T"), (0.0347, "34.7 G")])
def test_flops_text(tflops, text):
    assert report.flops_text(tflops) == f"{text}FLOP/s"


@pytest.mark.parametrize(("count", "text"), [(8.03e9, "8.03 B"), (134_515_008, "134.5 M")])
def test_count_text(count, text):
    assert report.count_text(count) == text


def test_running_mean():
    assert report._running_mean([1.0, 2.0, 6.0, 3.0, 8.0], 3) == pytest.approx([1.5, 3, 11 / 3, 17 / 3, 5.5])


def test_answers_about_images(run_dir):
    """Shares with their intervals, and the pictures beside what was said of them."""
    answers = [{"question": "Name it.", "reference": "B", "before": "*no*", "after": "B", "image": "answers/0.png"}]
    exact = {"before": (0.0, 0.0, 0.0188), "after": (0.935, 0.8921, 0.9616), "commonest": 0.1, "count": 200}
    summary = report.write(run_dir, {"answers": answers, "exact": exact})
    text = (run_dir / "summary.md").read_text()
    assert "| held-out answers that are right word for word | 0.0% (0.0% to 1.9%) | 93.5% (89.2% to 96.2%) |" in text
    line = "0.0% (0.0% to 1.9%) -> 93.5% (89.2% to 96.2%) of 200 held-out answers (Wilson's intervals of 95%); "
    assert f"exact        {line}always the commonest answer: 10.0%" in report.terminal_lines(summary)
    assert '<img src="answers/0.png" height="96">' in text and "- before: \\*no\\*" in text and "- reference: B" in text
    report.write(run_dir, {"exact": {name: exact[name] for name in ("after", "commonest", "count")}})
    assert "word for word | not measured | 93.5% (89.2% to 96.2%) |" in (run_dir / "summary.md").read_text()
