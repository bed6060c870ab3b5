"""What is not saved: a checkpoint that does not fit, before any of it is written, and a run that has learnt nothing."""

from types import SimpleNamespace

import pytest

from nemo_ext import platform, run_folder
from nemo_ext.errors import RunError

platform.activate()

from nemo_ext.callbacks import checkpoint  # noqa: E402  (Lightning imports torchvision, which needs the platform)


def test_no_save_without_space(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    saves = []

    def save(partial, storage_options):
        saves.append(partial.name)
        partial.mkdir(parents=True)
        (partial / "weights").write_bytes(bytes(3 << 20))

    strategy = SimpleNamespace(megatron_parallel=SimpleNamespace(sharded_state_dict=dict), lightning_module_state_dict=dict)
    trainer = SimpleNamespace(global_step=4, is_global_zero=True, save_checkpoint=save, strategy=strategy)
    callback = checkpoint.AtomicCheckpoint(str(folder), every=4, keep=1, async_save=False, size=2 << 20)
    free = 2 << 20
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: free)
    free -= 1
    with pytest.raises(RunError, match="the disk is full: .* continues from the start; the checkpoint of step 4 needs 0.00 GiB"):
        callback.save(trainer)
    assert saves == [] and not folder.exists()
    free += 1
    callback.save(trainer)  # as large as was foreseen
    assert run_folder.manifest_bytes(folder / "step-000004") == 3 << 20
    trainer.global_step = 8
    with pytest.raises(RunError, match="continues from step 4; the checkpoint of step 8"):
        callback.save(trainer)  # and now it is known how large one is
    free = 3 << 20
    callback.save(trainer)
    assert saves == ["step-000004.partial", "step-000008.partial"]
    assert [path.name for path in folder.iterdir()] == ["step-000008"]


def test_a_run_that_ends_before_its_first_step_saves_nothing(tmp_path):
    """The model as it came is what the same command begins with anyway."""
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, save_checkpoint=None)
    callback = checkpoint.AtomicCheckpoint(str(tmp_path / "checkpoints"), every=4, keep=1, async_save=False)
    callback.setup(trainer, None, "fit")
    callback.on_train_end(trainer, None)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "checkpoints" / "step-000008").mkdir(parents=True)
    trainer.global_step = 8
    callback.setup(trainer, None, "fit")
    callback.on_train_end(trainer, None)  # nor one that has only gone on
