"""The line that says where a start's seconds went."""

import pytest

from nemo_ext import platform

platform.activate()

from nemo_ext.callbacks import start  # noqa: E402  (Lightning imports torchvision, which needs the platform)


@pytest.mark.parametrize("evaluated_after", [False, True])
def test_an_evaluation_after_the_first_step_is_no_part_of_it(evaluated_after, monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(start.time, "monotonic", lambda: now)
    times = start.StartTimes({"command": 2.0, "imports": 8.0})
    for seconds, call in ((5, "on_validation_start"), (3, "on_validation_end"), (0.5, "on_train_start")):
        now += seconds
        getattr(times, call)(None, None)
    now += 4
    if evaluated_after:
        times.on_validation_start(None, None)
        now += 3
        times.on_validation_end(None, None)
    times.on_train_batch_end(None, None, None, None, 0)
    now += 4
    times.on_train_batch_end(None, None, None, None, 1)
    said = "first step after 22.5 s: command 2.0, imports 8.0, model and checkpoint 5.5, evaluation 3.0, step 4.0\n"
    assert capsys.readouterr().out == said
