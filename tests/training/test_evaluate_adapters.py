"""python launchers/evaluate.py on what adapters' runs leave: each kind computes what was trained, beside base and export."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from conversion.lora import from_nemo
from conversion.lora.nemo import describe
from launchers import evaluate
from nemo_ext import run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.command_line import main
from nemo_ext.evaluation.model import Request

SEQ = 64
KEYS = dict(seq=SEQ, lr=1e-2, warmup=0, micro_batch=4, steps=4, val_every=4, val_batches=1)
RANK = dict(rank=4, alpha=8.0)
KINDS = {
    "lora": RANK,
    "dora": RANK,
    "qlora": dict(RANK, targets="q_proj,down_proj"),
    "adalora": dict(init_rank=4, target_rank=2, alpha=8.0, rank_warmup=1, rank_final=1, delta_t=1),
    "fourierft": dict(n_frequency=200, scaling=300.0),
    "moe_dora": dict(RANK, experts=3, top_k=2, top_layers=2, ranks="q_proj:2"),
}
TOKENS = torch.arange(2 * 32).reshape(2, 32) * 7 % 500  # what the probe computed
RECORDED = {"qlora": "lora"}


@pytest.fixture(scope="module")
def runs(train, chats, models, tokenizer):
    """A run of each kind on the wide Llama, described as the launcher describes it."""
    import recipes

    cases = [
        dict(name=kind, recipe=f"{kind}_llama3", model="wide", keys={**KEYS, **keys}, blend=chats.blend(), probe=True)
        for kind, keys in KINDS.items()
    ]
    folder, architecture = train(cases, 1), Architecture(**models["wide"]["architecture"])
    for kind, keys in KINDS.items():
        described = folder / kind / run_folder.MODEL
        described.mkdir()
        keys = recipes.finish(recipes.resolve(f"{kind}_llama3", {**KEYS, **keys}, cuda=False))
        kind = RECORDED.get(kind, kind)
        settings = describe(architecture, keys, models["wide"]["hf"], "float32", kind=kind, nf4="qlora" in described.parts)
        run_folder.write_json(described / "architecture.json", architecture.to_dict())
        run_folder.write_json(described / "adapter.json", settings)
        shutil.copytree(tokenizer, described / "tokenizer")
    shutil.copytree(models["wide"]["hf"], folder / "base")
    shutil.copytree(tokenizer, folder / "base", dirs_exist_ok=True)
    return folder


def notes(folder):
    (folder / "notes.md").write_text("The argument parser reads a list of strings and returns a namespace. " * 8)
    return folder / "notes.md"


def evaluation(out, *models: str, **keys) -> evaluate.Evaluation:
    return evaluate.Evaluation(evaluate.Options(model=list(models), tasks=f"ppl:{notes(out)}", out=str(out / "out"), **keys))


def log_likelihoods(model) -> np.ndarray:
    return np.stack(model.log_likelihoods([Request(tuple(row), 1) for row in TOKENS.tolist()]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_evaluated_as_it_was_trained(runs, kind, tmp_path):
    (candidate,) = (each := evaluation(tmp_path, f"nemo:{runs / kind}")).candidates
    trained = torch.load(runs / kind / "probe0.pt")["logits"].log_softmax(-1)
    wanted = trained[:, :-1].gather(2, TOKENS[:, 1:, None])[..., 0].numpy()
    np.testing.assert_allclose(log_likelihoods(each._model(candidate)), wanted, atol=2e-5)
    each._release(candidate)
    assert not (tmp_path / "out" / evaluate.EXPORTED).exists()


def command(*arguments: str) -> int:
    return main(evaluate.Options, evaluate.command, list(arguments), about="", example="")


def losses(out) -> dict[str, float]:
    """Nats per token by model."""
    (models,) = json.loads((out / "report.json").read_text())["tasks"].values()
    return {name: metric["value"] for name, found in models.items() for metric in found["metrics"] if "nats" in metric["name"]}


def test_base_runs_and_exports_side_by_side(runs, tmp_path):
    """What PEFT knows gives the same from the run as from its export; the base of QLoRA's export is rounded where it is asked."""
    for kind in ("lora", "adalora", "qlora"):
        from_nemo.convert(runs / kind, tmp_path / f"{kind}-export")
    task, base = f"tasks=ppl:{notes(tmp_path)}", f"base=hf:{runs / 'base'}"
    given = [f"hf:{runs / 'base'}", *(f"nemo:{runs / kind}" for kind in KINDS)]
    given += [f"lora:{tmp_path / f'{kind}-export'}" for kind in ("lora", "adalora", "qlora")]
    assert command(f"model=[{','.join(given)}]", task, base, f"out={tmp_path / 'out'}") == 0
    assert command(f"model=lora:{tmp_path / 'qlora-export'}", task, base, "nf4=true", f"out={tmp_path / 'rounded'}") == 0
    found, rounded = losses(tmp_path / "out"), losses(tmp_path / "rounded")["qlora-export"]
    assert list(found) == ["base", *KINDS, "lora-export", "adalora-export", "qlora-export"]
    assert all(abs(found[kind] - found["base"]) > 1e-4 for kind in KINDS)
    for kind in ("lora", "adalora"):
        assert abs(found[kind] - found[f"{kind}-export"]) < 1e-6
    assert abs(found["qlora"] - rounded) < 1e-6 < 1e-4 < abs(found["qlora"] - found["qlora-export"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"]["qlora"]["adapter"] == f"LoRA on {runs / 'base'} in NF4"
    assert report["models"]["moe_dora"]["adapter"] == f"MoE-DoRA on {runs / 'base'}"


def test_the_base_that_an_adapter_names(runs, models, tmp_path):
    """A run's own base; a base that changed is another model."""
    (one,) = evaluation(tmp_path, f"nemo:{runs / 'lora'}").candidates
    assert str(one.adapter.base) == models["wide"]["hf"]
    (other,) = evaluation(tmp_path, f"nemo:{runs / 'lora'}", base=f"hf:{runs / 'base'}").candidates
    assert one.key != other.key


def test_adaloras_statistics_are_planned_as_they_are_kept(runs, models):
    from conversion.dist_checkpoint import read
    from nemo_ext import adapters

    _, folder = run_folder.newest_checkpoint(runs / "adalora" / run_folder.CHECKPOINTS)
    kept = {name: each for name, each in read(folder / "weights").items() if name.endswith(("importance", "uncertainty", "kept"))}
    counted = sum(math.prod(each.shape) * each.dtype.itemsize for each in kept.values())
    keys = {**KINDS["adalora"], "targets": "all-linear"}
    assert counted == adapters.statistics(Architecture(**models["wide"]["architecture"]), "adalora", keys) > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=hf:{peft}"], "holds a PEFT adapter: lora:"),
        (["model=lora:{base}"], "has no adapter_config.json of PEFT's"),
        (["model=lora:nowhere"], "there is no such folder"),
        (["model=peft:{peft}"], "give hf:FOLDER, nemo:RUN or lora:FOLDER"),
        (["model=hf:{base}", "nf4=true"], "nf4= is of adapters, and no model is one"),
        (["model=lora:{peft}", "base=nemo:{base}"], "give hf:FOLDER or hf:NAME"),
        (["model=lora:{peft}", "base=hf:{other}"], "does not fit .*other"),
        (["model=nemo:{moe}", "base=hf:{other}"], "which its base does not have: it is for another base"),
        (["model=lora:{cut}", "base=hf:{base}"], "lacks tensors of what it adapts"),
        (["model=lora:{elsewhere}"], "its base nobody/has-this is not on this machine: give base=hf:FOLDER"),
    ],
)
def test_what_is_refused_in_one_line(runs, models, tokenizer, tmp_path, capsys, arguments, says):
    from safetensors.torch import load_file, save_file

    peft = from_nemo.convert(runs / "lora", tmp_path / "peft")
    places = {"peft": peft, "base": runs / "base", "moe": runs / "moe_dora", "cut": tmp_path / "cut", "other": tmp_path / "other",
              "elsewhere": tmp_path / "elsewhere"}  # fmt: skip
    shutil.copytree(models["tied"]["hf"], places["other"])
    shutil.copytree(tokenizer, places["other"], dirs_exist_ok=True)
    shutil.copytree(peft, places["cut"])
    tensors = load_file(peft / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[4:]), places["cut"] / "adapter_model.safetensors")
    shutil.copytree(peft, places["elsewhere"])
    config = json.loads((peft / "adapter_config.json").read_text())
    (places["elsewhere"] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nobody/has-this"}))
    arguments = [argument.format(**places) for argument in arguments]
    assert command(*arguments, f"tasks=ppl:{notes(tmp_path)}", f"out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(says, error), error
