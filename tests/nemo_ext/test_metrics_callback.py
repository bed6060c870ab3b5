"""MetricsCallback: unit tests on a stand-in trainer, then real runs through MegatronStrategy against what NeMo logs itself."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nemo_processes import run_group

import nemo_ext.platform
from nemo_ext import run_folder
from nemo_ext.errors import RunError, UserError
from nemo_ext.platform import hardware

nemo_ext.platform.activate()

import torch  # noqa: E402
from lightning.pytorch.trainer.states import TrainerFn  # noqa: E402

from nemo_ext.callbacks import metrics  # noqa: E402

TOKENS = 100  # a step


class Optimizer:
    """Returns what Megatron's optimizer returns: (loss, gradient norm, zeros)."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.5, "pre_lr_mult": 0.5}, {"lr": 1.0, "pre_lr_mult": 1.0}]
        self.norms = iter(())

    def step(self, closure=None):
        return None, next(self.norms), None


class DeviceLoss:
    """A loss on a GPU: reading it is counted."""

    is_cuda = True
    read = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self):
        return self

    def __float__(self):
        DeviceLoss.read += 1
        return self.value


class Arriving:
    """Its way to the host."""

    def __init__(self, loss: DeviceLoss) -> None:
        self.loss = loss

    def __float__(self):
        return float(self.loss)


class Run:
    """Calls the hooks in Lightning's order."""

    def __init__(self, run_dir: Path, step: int = 0, max_steps: int = 10, fn: TrainerFn = TrainerFn.FITTING, **options) -> None:
        self.optimizer = Optimizer()
        self.trainer = SimpleNamespace(
            global_step=step,
            optimizers=[self.optimizer],
            is_global_zero=True,
            num_sanity_val_steps=0,
            state=SimpleNamespace(fn=fn),
            datamodule=SimpleNamespace(),
            callbacks=[],
        )
        options = {"tensorboard": False, **options}
        self.callback = metrics.MetricsCallback(str(run_dir), TOKENS, 1e9, num_devices=2, max_steps=max_steps, **options)

    def start(self) -> "Run":
        self.callback.on_train_start(self.trainer, None)
        return self

    def train(self, loss, norm: float = 1.0) -> None:
        self.callback.on_train_batch_start(self.trainer, None, None, 0)
        self.optimizer.norms = iter([norm])
        self.optimizer.step()
        self.trainer.global_step += 1
        loss = torch.tensor(loss) if isinstance(loss, float) else loss
        self.callback.on_train_batch_end(self.trainer, None, {"loss": loss}, None, 0)

    def validate(self, *losses: float) -> None:
        self.callback.on_validation_start(self.trainer, None)
        for loss in losses:
            self.callback.on_validation_batch_end(self.trainer, None, torch.tensor(loss), None, 0)
        self.callback.on_validation_end(self.trainer, None)

    def save(self) -> None:
        self.callback.on_save_checkpoint(self.trainer, None, {})

    def end(self) -> None:
        self.callback.on_train_end(self.trainer, None)
        self.callback.on_fit_end(self.trainer, None)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that moves two seconds whenever it is read."""
    now = iter(range(0, 100_000, 2))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(metrics, "_roles", lambda trainer: (True, True))
    DeviceLoss.read = 0


def steps(run_dir) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def phase(run_dir) -> str:
    return run_folder.read_status(run_dir)["phase"]


def test_a_line_per_step_and_validation(tmp_path):
    run = Run(tmp_path)
    run.validate(2.0, 4.0)
    run.start()
    run.train(2.5, norm=0.75)
    run.train(2.25, norm=None)  # a step that loss scaling skipped
    run.validate(1.0, 1.5)
    training, validations = run_folder.read_records(tmp_path)
    record = training[0]
    # Two seconds between the two readings of the clock: 50 tokens/s, at 1e9 operations a token on two devices.
    assert {key: record[key] for key in record if key not in ("time", "memory")} == {
        "step": 1, "loss": 2.5, "lr": 1.0, "grad_norm": 0.75, "tokens_per_s": 50.0, "tflops": 0.025, "step_time": 2.0,
        "tokens": 100,
    }  # fmt: skip
    assert 0.05 < record["memory"] < 64
    assert (training[1]["grad_norm"], training[1]["tokens"]) == (None, 200)
    assert [(v["step"], v["val_loss"]) for v in validations] == [(0, 3.0), (2, 1.25)]
    assert [v["val_ppl"] for v in validations] == pytest.approx([math.exp(3.0), math.exp(1.25)])


def test_the_learning_rate_is_the_schedules(tmp_path):
    """Not that of a group which NeMo has multiplied, as LoRA+ does B's."""
    run = Run(tmp_path).start()
    run.optimizer.param_groups = [{"lr": 1e-3, "pre_lr_mult": 1.0}, {"lr": 1.6e-2, "pre_lr_mult": 16.0}]
    run.train(1.0)
    run.end()
    assert run_folder.read_records(tmp_path)[0][0]["lr"] == pytest.approx(1e-3)


def test_other_callbacks_figures_are_in_the_step(tmp_path):
    run = Run(tmp_path).start()
    run.trainer.callbacks = [SimpleNamespace(figures={"balance": 1.5}), SimpleNamespace()]
    run.train(1.0)
    run.end()
    assert run_folder.read_records(tmp_path)[0][0]["balance"] == 1.5


def test_validation_and_saving_are_in_no_step_time(tmp_path):
    run = Run(tmp_path).start()
    for _ in range(3):
        run.train(1.0)
        run.save()
        for _ in range(50):
            metrics.time.perf_counter()  # a hundred seconds
    assert [r["step_time"] for r in run_folder.read_records(tmp_path)[0]] == [2.0, 2.0, 2.0]


def test_resume_drops_later_lines_and_counts_on(tmp_path):
    first = Run(tmp_path).start()
    for _ in range(6):
        first.train(1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    resumed = Run(tmp_path, step=4).start()
    assert steps(tmp_path) == [1, 2, 3, 4]
    resumed.train(1.0)
    resumed.end()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert run_folder.read_records(tmp_path)[0][-1]["tokens"] == 500
    assert phase(tmp_path) == "stopped"  # before max_steps


def test_evaluating_alone_drops_nothing(tmp_path):
    first = Run(tmp_path).start()
    first.train(1.0)
    Run(tmp_path, fn=TrainerFn.VALIDATING).validate(1.0)
    assert steps(tmp_path) == [1, 0]


def test_validation_batches_count_by_their_tokens(tmp_path):
    """Where the data module says what each batch weighs: (3 x 1.0 + 1 x 5.0) / 4."""
    run = Run(tmp_path).start()
    run.trainer.datamodule.val_weights = [3.0, 1.0]
    run.validate(1.0, 5.0)
    assert run_folder.read_records(tmp_path)[1][0]["val_loss"] == pytest.approx(2.0)


def test_on_a_gpu_the_loss_is_read_a_step_later(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "Arriving", Arriving)
    run = Run(tmp_path).start()
    run.train(DeviceLoss(1.0))
    assert DeviceLoss.read == 0 and not (tmp_path / "metrics.jsonl").exists()
    run.train(DeviceLoss(2.0))
    assert DeviceLoss.read == 1 and steps(tmp_path) == [1]
    run.save()
    assert steps(tmp_path) == [1, 2]
    run.train(DeviceLoss(3.0))
    run.end()
    assert steps(tmp_path) == [1, 2, 3] and DeviceLoss.read == 3


@pytest.mark.gpu
@pytest.mark.skipif(not hardware.has_cuda(), reason="needs a CUDA GPU")
def test_reading_a_loss_does_not_wait_for_what_came_after_it():
    loss = torch.full((), 2.5, device="cuda")
    torch.cuda.synchronize()
    arriving = metrics.Arriving(loss)
    loss.zero_()
    torch.cuda._sleep(2_000_000_000)  # clock cycles: a second
    after = torch.cuda.Event()
    after.record()
    assert float(arriving) == 2.5 and not after.query()


def test_log_every_keeps_saved_validated_and_last_steps(tmp_path):
    run = Run(tmp_path, log_every=4).start()
    for step in range(1, 11):
        run.train(1.0)
        if step == 6:
            run.save()
    run.end()
    assert steps(tmp_path) == [4, 6, 8, 10]


def test_phases(tmp_path):
    run = Run(tmp_path, max_steps=2)
    seen = []
    for action in (lambda: run.validate(1.0), run.start, lambda: run.train(1.0), run.save, lambda: run.train(1.0), run.end):
        action()
        status = run_folder.read_status(tmp_path)
        seen.append((status["phase"], status["step"]))
    assert seen == [("evaluating", 0), ("training", 0), ("training", 0), ("saving", 1), ("training", 1), ("finished", 2)]
    assert status["max_steps"] == 2 and status["started"] > 1.7e9


@pytest.mark.parametrize(
    ("loss", "norm", "what"),
    [
        (float("nan"), float("nan"), "loss is nan"),
        (2.0, float("inf"), "gradient norm is inf"),
        (float("inf"), 0.0, "loss is inf"),
    ],
)
def test_numbers_that_are_none_fail_the_run(tmp_path, loss, norm, what):
    run = Run(tmp_path).start()
    run.train(1.0)
    with pytest.raises(RunError, match=f"{what} at step 2") as error:
        run.train(loss, norm)
    run.callback.on_exception(run.trainer, None, error.value)
    status = run_folder.read_status(tmp_path)
    assert status["phase"] == "failed" and status["message"].startswith(f"{what} at step 2: lower lr=")
    assert steps(tmp_path) == [1, 2]


def test_ranks_without_the_loss_fail_with_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_roles", lambda trainer: (False, False))
    run = Run(tmp_path).start()
    with pytest.raises(RunError, match="gradient norm is nan at step 1"):
        run.train(0.0, float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_megatrons_own_check_is_told_in_our_words(tmp_path):
    run = Run(tmp_path).start()
    run.train(1.0)
    error = RuntimeError("Rank 0: Unexpected result nan (message='found NaN in local grad norm for bucket #0')")
    run.callback.on_exception(run.trainer, None, error)
    assert run_folder.read_status(tmp_path)["message"].startswith("gradient is nan at step 2")


def test_failure_before_training(tmp_path):
    run = Run(tmp_path)
    run.callback.on_exception(run.trainer, None, FileNotFoundError("no such checkpoint\nat all"))
    status = run_folder.read_status(tmp_path)
    assert (status["phase"], status["message"]) == ("failed", "FileNotFoundError: no such checkpoint")


def test_tensorboard_has_the_same_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path, tensorboard=True).start()
    for step in range(1, 5):
        run.train(float(step))
    run.end()
    resumed = Run(tmp_path, step=2, tensorboard=True).start()
    resumed.train(30.0)
    resumed.validate(1.5)
    resumed.end()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(3, 1.5)]
    assert events.Scalars("lr")[0].value == 1.0


def test_wandb_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics.MetricsCallback(str(tmp_path), TOKENS, 1e9, 1, 10, wandb="project")


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls, logged = [], []
    run = SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: logged.append("finished"))
    fresh = iter(["first", "second"])
    fake = SimpleNamespace(
        util=SimpleNamespace(generate_id=lambda: next(fresh)), init=lambda **options: calls.append(options) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 1):
        started = Run(tmp_path, step=step, wandb="project").start()
        started.train(2.0)
        started.end()
    assert [call["id"] for call in calls] == ["first", "first"] and calls[0]["project"] == "project"
    assert [entry if isinstance(entry, str) else (entry[0], entry[1]["loss"]) for entry in logged] == [
        (1, 2.0),
        "finished",
        (2, 2.0),
        "finished",
    ]
    assert Run(tmp_path, wandb="project").start() and calls[2]["id"] == "second"


def train(*arguments) -> None:
    """In each process of a group."""
    import metrics_worker

    metrics_worker.main(*arguments)


def check(run_dir: Path, rank: int, last: int) -> None:
    """metrics.jsonl against NeMo's own figures of a rank up to step `last`."""
    reference = json.loads((run_dir / f"reference{rank}.json").read_text())
    training, validations = run_folder.read_records(run_dir)
    ours = [[r["step"], r["loss"], r["lr"], r["grad_norm"]] for r in training[:last]]
    assert len(ours) == last
    for mine, nemos in zip(ours, reference["steps"][:last], strict=True):
        assert mine == pytest.approx(nemos, rel=1e-6)
    assert validations[0]["step"] == 0 and validations[0]["val_loss"] == pytest.approx(training[0]["loss"], abs=1e-6)
    assert len(validations) == len(reference["validations"])
    for mine, nemos in zip(validations, reference["validations"], strict=True):
        assert [mine["step"], mine["val_loss"]] == pytest.approx(nemos, rel=1e-6)


def test_one_process(tmp_path):
    run_group(1, train, str(tmp_path), 1, 1, 5, 0, log=tmp_path / "log")
    check(tmp_path, 0, last=5)
    assert steps(tmp_path) == [0, 1, 2, 3, 3, 4, 5]
    assert phase(tmp_path) == "finished"
    assert [r["tokens"] for r in run_folder.read_records(tmp_path)[0]] == [128, 256, 384, 512, 640]


def test_two_pipeline_stages_that_end_in_nan_do_not_hang(tmp_path):
    with pytest.raises(AssertionError, match=r"exit codes \[1, 1\]"):
        run_group(2, train, str(tmp_path), 2, 1, 50, 5, log=tmp_path / "log")
    for rank in (0, 1):
        check(tmp_path, rank, last=4)
    assert steps(tmp_path) == [0, 1, 2, 3, 3, 4, 5]
    status = run_folder.read_status(tmp_path)
    assert status["phase"] == "failed" and status["message"].startswith("loss is nan at step 5")
    log = (tmp_path / "log").read_text()
    assert "\nnemo_ext.errors.RunError: gradient norm is nan at step 5" in log
    assert "\nnemo_ext.errors.RunError: loss is nan at step 5" in log
