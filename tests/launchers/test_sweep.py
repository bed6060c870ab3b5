"""The grid of a sweep: its runs, what is refused, going on, and the comparison. What runs is made up here."""

import json

import pytest

from launchers import grammar, sweep
from nemo_ext import run_folder
from nemo_ext.errors import RunError, UserError


def command(*arguments):
    return grammar.parse(["recipe=pretrain_custom", "layers=2", "hidden=64", "heads=4", "vocab=512", "steps=4", *arguments])


def test_the_grid(tmp_path):
    points = sweep.expand(command("sweep.lr=[1e-5,3e-5]", "sweep.seq=[64,128]", f"out={tmp_path}", "gpus=1"))
    assert [point.name for point in points] == [
        "lr-1e-05_seq-64", "lr-1e-05_seq-128", "lr-3e-05_seq-64", "lr-3e-05_seq-128",
    ]  # fmt: skip
    last = points[-1]
    assert last.out == tmp_path / last.name and last.values == {"lr": 3e-5, "seq": 128}
    assert last.command.sweep == {} and last.command.recipe == "pretrain_custom"
    wanted = {"layers": 2, "hidden": 64, "heads": 4, "vocab": 512, "steps": 4, "gpus": 1}
    assert last.command.keys == {**wanted, "lr": 3e-5, "seq": 128, "out": str(last.out)}
    assert points[0].command.keys["lr"] == 1e-5  # the points share nothing


def test_paths_long_names_and_the_folder():
    points = sweep.expand(command("sweep.model.config.hidden_dropout=[0.0,0.1]"))
    assert [point.command.overrides for point in points] == [{"model.config.hidden_dropout": value} for value in (0.0, 0.1)]
    assert str(points[0].out) == "runs/pretrain_custom-smoke-sweep/model.config.hidden_dropout-0.0"
    data = [f"{'x' * 100}/a b:{i}.jsonl" for i in range(2)] + [f"{'x' * 130}{i}" for i in range(2)]
    names = [point.name for point in sweep.expand(command(f"sweep.data={json.dumps(data)}"))]
    assert len(set(names)) == 4 and all(len(name) <= 120 and "/" not in name and " " not in name for name in names)
    assert sweep._name({"data": ["a:0.5", "b:0.5"], "sp": True}) == "data-a-0.5-b-0.5_sp-true"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sweep.lrr=[1,2]"], "unknown key lrr, did you mean lr?"),
        (["sweep.lr=[1e-5,fast]"], "lr=fast must be a number"),
        (["sweep.warmup=[1,1.5]"], "warmup=1.5 must be a whole number"),
        (["sweep.lr=[1e-5,-1.0]"], r"lr=-1.0 must be above 0$"),
        (["sweep.lr=[1e-5,-1.0]", "sweep.seq=[64]"], r"lr=-1.0 must be above 0 \(sweep: lr=-1.0 seq=64\)"),
        (["sweep.precision=[bf16,fp7]"], "precision=fp7 is none of bf16, fp16"),
        (["sweep.lr=1e-5"], r"sweep.lr=1e-05 must be a list"),
        (["sweep.lr=[]"], r"sweep.lr=\[\] must be a list"),
        (["sweep.lr=[1e-5,1e-5]"], "has a value twice"),
        (["sweep.lr=[1e-5,2e-5]", "lr=3e-5"], "lr= is given twice: plainly and in the sweep"),
        (["sweep.out=[a,b]"], "sweep.out: out= is the sweep's own"),
        (["sweep.tp=[3]"], None),  # only a plan knows
    ],
)
def test_bad_sweeps(arguments, message, tmp_path):
    given = command(*arguments, f"out={tmp_path / 'out'}")
    if message is None:
        sweep.expand(given)
    else:
        with pytest.raises(UserError, match=message):
            sweep.expand(given)


def test_nothing_starts_when_a_plan_is_refused(tmp_path):
    from launchers.run import launch

    started = []

    def planning(point):
        if not point.plan:
            started.append(point)
        return launch(point)

    bad = command("sweep.tp=[1,3]", "gpus=2", f"out={tmp_path / 'out'}")
    with pytest.raises(UserError, match=r"tp=3.*\(sweep: tp=3\)"):
        sweep.run(bad, planning)
    assert started == [] and not (tmp_path / "out").exists()


def trained(point, loss):
    """What a complete run leaves, as far as the sweep reads it."""
    point.out.mkdir(parents=True, exist_ok=True)
    (point.out / "config.yaml").write_text("recipe: pretrain_custom\nsteps: 4\n")
    lines = [{"step": 0, "val_loss": 6.0, "time": 1.0}, {"step": 4, "val_loss": loss, "time": 2.0}]
    (point.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"steps": 4, "val_loss_before": 6.0, "val_loss_after": loss, "train_loss_last": 5.5, "tokens_per_s": 1234.5,
             "wall_time": 65.0}  # fmt: skip
    run_folder.write_json(point.out / "summary.json", found)


def test_a_sweep_goes_on_where_it_was(tmp_path, capsys):
    given = command("sweep.lr=[1e-3,2e-3,3e-3]", f"out={tmp_path}")
    points = {str(point.out): point for point in sweep.expand(given)}
    losses, started = {1e-3: 5.2, 2e-3: None, 3e-3: 5.1}, []

    def launch(one):
        if one.plan:
            return 0
        point = points[one.keys["out"]]
        started.append(point.values["lr"])
        if losses[point.values["lr"]] is None:
            raise RunError("rank 1 was killed")
        trained(point, losses[point.values["lr"]])
        return 0

    assert sweep.run(given, launch) == 1 and started == [1e-3, 2e-3, 3e-3]
    rows = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [(row["values"]["lr"], row["status"]) for row in rows] == [
        (3e-3, "complete"), (1e-3, "complete"), (2e-3, "failed: rank 1 was killed"),
    ]  # fmt: skip
    losses[2e-3] = 5.0
    assert sweep.run(given, launch) == 0 and started == [1e-3, 2e-3, 3e-3, 2e-3]
    rows = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [row["values"]["lr"] for row in rows] == [2e-3, 3e-3, 1e-3] and rows[0]["message"] == ""
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert table[2:5] == [
        "| lr | held-out loss | training loss | tokens/s | time | status |", "|---|---|---|---|---|---|",
        "| 0.002 | 5.0000 | 5.5000 | 1,234 | 1:05 | complete |",
    ]  # fmt: skip
    assert "complete" in capsys.readouterr().out


def test_a_signal_ends_the_sweep(tmp_path):
    started = []

    def launch(one):
        if not one.plan:
            started.append(one)
        return 0 if one.plan else 130

    assert sweep.run(command("sweep.lr=[1e-3,2e-3]", f"out={tmp_path}"), launch) == 130 and len(started) == 1


def test_listing_starts_nothing(tmp_path, capsys):
    given = command("sweep.lr=[1e-3,2e-3]", f"out={tmp_path / 'out'}", "dryrun=true")
    assert sweep.run(given, lambda one: pytest.fail("started")) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines() == [f"lr-0.001: {out / 'lr-0.001'}", f"lr-0.002: {out / 'lr-0.002'}"]
    assert not out.exists()


def test_another_sweeps_folder_is_refused(tmp_path):
    run_folder.write_json(tmp_path / "sweep.json", {"recipe": "cpt_llama3", "points": []})
    given = command("sweep.lr=[1e-3]", f"out={tmp_path}")
    with pytest.raises(UserError, match="holds a sweep of cpt_llama3"):
        sweep.begin(given, sweep.expand(given))
