"""The grammar: key=value, config=, nearest names, types."""

import pytest

from launchers import grammar
from nemo_ext.errors import UserError


def test_types_and_paths():
    command = grammar.parse(["recipe=cpt_llama3", "lr=1e-5", "gpus=2", "sp=true", "data=[a.txt:0.7,b.md:0.3]", "size=8b",
                             "trainer.max_steps=7", "trainer.strategy.ckpt_parallel_save=false"])  # fmt: skip
    assert command.keys == {"lr": 1e-5, "gpus": 2, "sp": True, "data": ["a.txt:0.7", "b.md:0.3"], "size": "8b", "steps": 7}
    assert command.overrides == {"trainer.strategy.ckpt_parallel_save": False}
    assert grammar.parse(["lr=1", "model=hf:a/b", "wandb=none"]).keys == {"lr": 1.0, "model": "hf:a/b", "wandb": "none"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["recipe=cpt_llama3", "lerning_rate=1"], "unknown key lerning_rate"),
        (["lrr=1"], "unknown key lrr, did you mean lr?"),
        (["stepz=1"], "unknown key stepz, did you mean steps?"),
        (["steps=many"], "steps=many must be a whole number"),
        (["steps=1.5"], "steps=1.5 must be a whole number"),
        (["lr=fast"], "lr=fast must be a number"),
        (["overlap=1"], "overlap=1 must be true or false"),
        (["cpt_llama3"], "'cpt_llama3' is not key=value"),
        (["lr=1e-5", "lr=2e-5"], "lr= is given twice"),
        (["steps=5", "trainer.max_steps=5"], "trainer.max_steps and steps are one key"),
        (["config=nowhere.yaml"], "config=nowhere.yaml: there is no such file"),
        (["executor=cloud"], "executor=cloud is unknown: local"),
        (["data=[a"], "data=\\[a: "),
    ],
)
def test_bad_lines(arguments, message):
    with pytest.raises(UserError, match=message):
        grammar.parse(arguments)


def test_config_and_command_line_compose(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text(
        "recipe: cpt_llama3\nlr: 1e-5\nseq: 512\ntrainer:\n  max_steps: 9\n  strategy:\n    ckpt_parallel_save: false\n"
    )
    command = grammar.parse([f"config={file}", "seq=256"])
    assert command.recipe == "cpt_llama3"
    assert command.keys == {"lr": 1e-5, "seq": 256, "steps": 9}
    assert command.overrides == {"trainer.strategy.ckpt_parallel_save": False}


@pytest.mark.parametrize("text", ["", "just words", "a: [1", "\t- x: {"])
def test_unreadable_config(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="config="):
        grammar.parse([f"config={file}"])


def test_an_empty_part_of_a_configuration_is_no_silence(tmp_path):
    (tmp_path / "given.yaml").write_text("recipe: cpt_llama3\ntrainer: {}\n")
    with pytest.raises(UserError, match="unknown key trainer"):
        grammar.parse([f"config={tmp_path / 'given.yaml'}"])


@pytest.mark.parametrize(
    ("name", "inside", "outside", "says"),
    [("heldout", [0, 0.5, None], [1, -0.1, float("nan")], "at least 0 and below 1"),
     ("decay", [0, 1.0], [1.1], "at least 0 and at most 1"),
     ("seq", [1, None], [0, -1], "above 0"), ("clip", [0.0], [-1.0], "not be negative"),
     ("spike_factor", [1.1], [1.0], "above 1")],
)  # fmt: skip
def test_limits_of_numbers(name, inside, outside, says):
    from nemo_ext.command_line import check_value
    from recipes.keys import fields

    for value in inside:
        check_value(name, value, fields()[name])
    for value in outside:
        with pytest.raises(UserError, match=f"{name}={value} must (be )?{says}"):
            check_value(name, value, fields()[name])


def test_saved_configuration_reads_back(tmp_path):
    import recipes

    keys = recipes.finish({**recipes.resolve("cpt_llama3", {"steps": 50, "data": ["a:0.5", "b:0.5"]}, cuda=False)})
    overrides = {"trainer.strategy.ckpt_parallel_save": False}
    grammar.save(tmp_path / "config.yaml", "cpt_llama3", keys, overrides)
    command = grammar.parse([f"config={tmp_path / 'config.yaml'}"])
    assert command.recipe == "cpt_llama3" and command.overrides == overrides
    assert {k: v for k, v in command.keys.items() if v is not None} == {k: v for k, v in keys.items() if v is not None}


def test_help_shows_every_key_with_its_default():
    from recipes.keys import fields

    text = "\n".join(grammar.help_lines("pretrain_llama3", {"lr": 3e-4}))
    conversations = "\n".join(grammar.help_lines("sft_llama3", {}))
    for name, field in fields().items():
        only = field.metadata["only"]
        assert (f"  {name}=" in text) == (not only or "pretrain" in only)
        assert (f"  {name}=" in conversations) == (not only or "sft" in only)
    assert "default: 0.0003" in text and "GiB" in text
