"""What the host reads of tensors in a step, for which it would wait on a GPU."""

import json

import nemo_ext.platform

nemo_ext.platform.activate()

import pytest  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction  # noqa: E402

import recipes  # noqa: E402
from nemo_ext.callbacks.loss import SummedLoss  # noqa: E402
from nemo_ext.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """A folder with what was noted in two runs of six steps, with evaluations before, between and after."""
    out = tmp_path_factory.mktemp("noted")
    reads = dict(name="reads", callbacks={"Reads": dict(step=4, file=str(out / "reads.json"))})
    graphs = dict(name="graphs", callbacks={"GraphStandIn": dict(file=str(out / "graphs.json"))})
    train([reads, graphs], 1)
    return out


def test_a_graph_is_of_training_steps_only(runs):
    """GPUs have no part in it here; NeMo asks as it would there."""
    assert json.loads((runs / "graphs.json").read_text()) == [False] * 6


def test_a_step_reads_its_gradient_norm_and_nothing_else(runs):
    """Beside the metrics, which on a GPU read the loss of the step before."""
    reads = json.loads((runs / "reads.json").read_text())
    assert any("clip_grads.py" in callers for callers in reads), reads
    readers = [callers.split(" < ")[0] for callers in reads]
    assert not [reader for reader in readers if "/lightning/" in reader or "/nemo/" in reader], reads


@pytest.mark.parametrize(
    ("more", "why"), [(dict(device="cpu"), "for GPUs"), (dict(device="gpu", recompute="full"), "recompute=full")]
)
def test_what_cannot_be_captured_is_refused(more, why):
    with pytest.raises(UserError, match=why):
        recipes.load("pretrain_llama3", size="smoke", cuda_graphs=True, gpus=1, tp=1, pp=1, vp=1, cp=1, **more)


@pytest.mark.parametrize("counts", [[3, 5], [4, 0, 2], [7]])
def test_the_mean_loss_is_nemos(counts, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(2))  # two equal ranks
    monkeypatch.setattr(parallel_state, "get_data_parallel_group", lambda with_context_parallel: None)
    found = [{"loss_sum_and_ub_size": torch.tensor([1.5 * count + number if count else 0.0, count])}
             for number, count in enumerate(counts)]  # fmt: skip
    expected = sum(1.5 * count + number for number, count in enumerate(counts) if count) / sum(counts)
    assert SummedLoss().reduce(found).item() == pytest.approx(expected)
    assert SummedLoss().reduce(found).item() == MaskedTokenLossReduction().reduce(found).item()


def test_a_stage_without_losses_has_none():
    assert SummedLoss().reduce([]).item() == 0.0
