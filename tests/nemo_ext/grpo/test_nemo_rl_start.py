"""Planning and starting NeMo-RL, as far as it goes without it: layouts, commands, and the driver's part."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from launchers import nemo_rl_engine as engine
from nemo_ext import run_folder
from nemo_ext.errors import RunError, UserError
from nemo_ext.grpo.nemo_rl import emit, problems, train, tree
from recipes.grpo import GrpoKeys
from recipes.models import FAMILIES

GIB = 2**30
LLAMA = FAMILIES["llama3"].sizes


def keys(**changes):
    given = {"gpus": 8, "steps": 20, "every": 10, "val_every": 5, "device": "gpu"}
    return {**dataclasses.asdict(GrpoKeys()), **given, **changes}


def planned(size="8b", memory=80, **changes):
    return engine.plan(keys(**changes), LLAMA[size].architecture, memory * GIB, "v0.8.0")


class TestPlan:
    def test_a_model_that_fits_one_gpu_is_not_split(self):
        plan = planned()
        assert {k: plan.keys[k] for k in "tp pp cp ep generation_tp".split()} == dict(tp=1, pp=1, cp=1, ep=1, generation_tp=1)
        assert plan.policy.layout.dp == 8 and plan.keys["recompute"] is False
        text = "\n".join(plan.lines())
        assert "vLLM, 8 replicas of TP 1" in text and "the policy's GPUs, in turns with it" in text
        assert "kl=0" in text and "vp=1" not in text
        # by hand: 8.03e9 parameters of 2 bytes are 14.96 GiB; 60% of 80 GiB leave 33.04; a token's keys and values take 128 KiB
        assert "14.96 GiB a GPU" in text and "33.04 GiB a GPU" in text
        assert f"{int((0.6 * 80 * GIB - 8030261248 * 2) / (640 * 131072)):,} sequences of 640 tokens" in text

    def test_a_large_model_is_split_and_the_reference_counted(self):
        plan = planned("70b", nodes=4, kl=0.01)
        split = plan.keys["tp"] * plan.keys["pp"]
        assert split > 1 and plan.keys["generation_tp"] >= 4  # 131 GiB of weights in 48 GiB each
        each = 70553706496 * 2 / split / GIB
        assert f"{each:.2f} GiB of the machine's memory for each GPU" in "\n".join(plan.lines())

    def test_recomputation_only_where_nothing_fits_without(self):
        assert not planned("8b", gpus=2, tp=2, pp=1, cp=1, micro_batch=1).keys["recompute"]
        plan = planned("8b", gpus=2, tp=2, pp=1, cp=1, micro_batch=1, max_answer=10000)
        assert plan.keys["recompute"] is True
        config = engine.configuration(plan, LLAMA["8b"].architecture, emit.Paths("/m", "/t", None, "/r"), "v0.8.0")
        assert config["policy"]["megatron_cfg"]["activation_checkpointing"] is True
        assert planned(recompute=True).keys["recompute"] is True
        with pytest.raises(UserError, match="does not fit"):
            planned("8b", gpus=2, tp=2, pp=1, cp=1, micro_batch=1, max_answer=10000, recompute=False)

    def test_generation_apart_takes_gpus_from_the_policy(self):
        plan = planned(generation_gpus=4)
        assert plan.policy.layout.dp * plan.keys["tp"] * plan.keys["pp"] == 4
        assert "4 of 8 GPUs, of their own" in "\n".join(plan.lines())

    @pytest.mark.parametrize(
        ("size", "changes", "says"),
        [
            ("8b", {"tp": 3}, "tp=3 does not divide num_attention_heads=32; nearest that works: tp="),
            ("70b", {}, "does not fit: 70.6B parameters"),
            ("8b", {"prompts": 3, "group": 2, "tp": 1, "pp": 1}, "prompts x group = 6 is not a multiple of micro_batch=1 x dp=8"),
            ("70b", {"nodes": 4, "generation_tp": 2}, "vLLM needs 131.* GiB .* on generation_tp=2 GPUs, of which it has 60%"),
            ("8b", {"loss": "dr_grpo"}, "loss=dr_grpo"),
        ],
    )
    def test_refusals(self, size, changes, says):
        with pytest.raises(UserError, match=says) as error:
            planned(size, **changes)
        for word in ("global_batch", "seq=", "vp=", "recompute"):  # GRPO has no such keys
            assert word not in str(error.value)


def test_overrides_by_path_reach_the_file(tmp_path):
    paths = emit.Paths("/m", "/t", "/v", str(tmp_path))
    plan, architecture = planned(), LLAMA["8b"].architecture
    config = engine.configuration(plan, architecture, paths, "v0.5.0", {"nemo_rl.grpo.val_period": 3})
    written = yaml.safe_load(engine.write(tmp_path, config).read_text())
    assert written == config and written["grpo"]["val_period"] == 3
    with pytest.raises(UserError, match="the nearest is nemo_rl.grpo.val_period"):
        engine.configuration(plan, architecture, paths, "v0.5.0", {"nemo_rl.grpo.val_perod": 3})


def test_commands():
    line = engine.command_line(Path("/runs/a b"), "v0.5.0")
    assert line == (
        f"PYTHONPATH={engine.ROOT} NRL_MEGATRON_CHECKPOINT_DIR='/runs/a b/megatron' PYTHONUNBUFFERED=1 uv run --directory "
        "/opt/nemo-rl python -m nemo_ext.grpo.nemo_rl.train 'run=/runs/a b' version=v0.5.0"
    )
    with pytest.raises(UserError, match="nodes=2: executor=local is one machine"):
        engine.require_local(keys(nodes=2))
    with pytest.raises(UserError, match=r"not installed here: run this inside nvcr.io/nvidia/nemo-rl:v0.5.0, .*engine=embedded"):
        engine.require_local(keys(nemo_rl_version="v0.5.0"))


class TestLocal:
    """`run_local` with a program named uv in NeMo-RL's place."""

    @pytest.fixture
    def start(self, tmp_path, monkeypatch):
        def start(python):
            uv = tmp_path / "bin" / "uv"
            uv.parent.mkdir()
            uv.write_text(f"#!{sys.executable}\nimport sys, time\nsys.path.insert(0, {str(engine.ROOT)!r})\n{python}\n")
            uv.chmod(0o755)
            monkeypatch.setenv("PATH", f"{uv.parent}:{os.environ['PATH']}")
            monkeypatch.setattr(engine, "_home", lambda: str(tmp_path))
            engine.run_local(tmp_path / "run", "v0.8.0")

        return start

    def test_complete(self, start, tmp_path, capfd):
        start(
            "from pathlib import Path\nfrom nemo_ext.grpo.nemo_rl import train\nrun = Path(sys.argv[-2].partition('=')[2])\n"
            "log = train.recording(lambda *a, **k: None, run, 1, 8)\nlog({'loss': 0.5}, 1, prefix='train')\n"
            "log({'total_step_time': 2.0}, 1, prefix='timing/train')\nprint('hello', sys.argv[1:4])"
        )
        assert "hello ['run', '--directory'" in (tmp_path / "run" / "logs" / engine.LOG).read_text()
        assert "step 1/1  loss 0.5000" in capfd.readouterr().out

    def test_what_the_driver_says_is_raised(self, start):
        with pytest.raises(UserError, match="prompts=3"):
            start(
                "from nemo_ext import run_folder\nrun = sys.argv[-2].partition('=')[2]\n"
                "run_folder.write_failure(run, 'too few: prompts=3', 2)\nsys.exit(2)"
            )

    def test_a_failure_without_a_word_names_the_log(self, start):
        with pytest.raises(RunError, match="NeMo-RL ended with exit code 7; the log is .*nemo_rl.log"):
            start("sys.exit(7)")

    def test_stopping_stops_the_run(self, start, tmp_path):
        pid = tmp_path / "pid"

        def stop(number, frame):
            raise KeyboardInterrupt

        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        began = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                start(f"import os\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert time.monotonic() - began < 30  # it did not wait for the end
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_newest_checkpoint(tmp_path, monkeypatch):
    assert engine.newest_checkpoint(tmp_path) is None
    with pytest.raises(RunError, match="no checkpoint to export"):
        engine.export(tmp_path, tmp_path / "hf")
    for name in ("step_5", "step_10", "tmp_step_15", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert engine.newest_checkpoint(tmp_path) == (10, tmp_path / "checkpoints" / "step_10")
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/bash\necho "$@"\nmkdir "${@: -1}"\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(engine, "_home", lambda: "/nemo")
    (tmp_path / "logs").mkdir()
    engine.export(tmp_path, tmp_path / "hf")
    assert (tmp_path / "hf").is_dir()
    said = (tmp_path / "logs" / "export.log").read_text()
    weights = tmp_path / "checkpoints/step_10/policy/weights/iter_0000000"
    assert said.startswith("run --directory /nemo --extra mcore python /nemo/examples/converters/convert_megatron_to_hf.py")
    assert f"--megatron-ckpt-path {weights} --hf-ckpt-path {tmp_path / 'hf.partial'}" in said


ROWS = [{"question": f"{i} + {i}?", "answer": str(2 * i), "tests": [i], "prompt": [{"role": "user", "content": f"{i} plus {i}"}]}
        for i in range(4)]  # fmt: skip


def write_rows(path, rows=ROWS):
    problems.write(path, [row | {"ids": [1, 2]} for row in rows])
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    words = "<unk> <user> <answer> plus 0 1 2 3".split()
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}"
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)


def test_a_problem_becomes_a_prompt(tmp_path, tokenizer):
    rows = problems.read(write_rows(tmp_path / "train.jsonl"))
    assert rows == [row | {"task_name": "rewards"} for row in ROWS]
    datum = problems.process(rows[3], None, tokenizer, 5, 3)
    message = datum["message_log"][0]
    assert message["content"] == "<user> 3 plus 3 <answer>" and message["token_ids"].tolist() == [1, 7, 3, 7, 2]
    assert datum["length"] == 5 and datum["loss_multiplier"] == 1.0 and datum["idx"] == 3 and datum["task_name"] == "rewards"
    assert datum["extra_env_info"] == {"question": "3 + 3?", "answer": "6", "tests": [3]}  # all that a reward may want
    cut = problems.process(rows[3], None, tokenizer, 3, 3)
    assert cut["length"] == 3 and cut["loss_multiplier"] == 0.0
    with pytest.raises(UserError, match="train.jsonl:2 is not a JSON object with `prompt`"):
        problems.read(write_rows(tmp_path / "train.jsonl", [ROWS[0], {"question": "?"}]))
    with pytest.raises(UserError, match="train.jsonl:1: prompt must be a list"):
        problems.read(write_rows(tmp_path / "train.jsonl", [{"prompt": "text"}]))


def test_a_prompt_shows_the_tools(tmp_path, tokenizer):
    problems.write(tmp_path / "train.jsonl", ROWS, [{"name": "2"}])
    (row, *_) = problems.read(tmp_path / "train.jsonl")
    datum = problems.process(row, None, tokenizer, 9, 0)
    assert datum["message_log"][0]["content"] == "2 <user> 0 plus 0 <answer>"
    assert datum["extra_env_info"] == {"question": "0 + 0?", "answer": "0", "tests": [0]}


class FakeNemoRl:
    """The parts of NeMo-RL that the driver calls, with the parameters that they have in the sources, noting what they get."""

    def __init__(self, version, monkeypatch, tokenizer):
        self.version, self.calls, self.log, self.registry = version, {}, [], {}
        logger = types.SimpleNamespace(log_metrics=lambda metrics, step, prefix="", **more: self.log.append((prefix, step)))
        self.modules = {
            "nemo_rl.algorithms.grpo": {"setup": self.setup, "grpo_train": self.grpo_train, "MasterConfig": self.master_config,
                                        "shutdown_environments": lambda a, b: self.calls.update(shut=a)},
            "nemo_rl.algorithms.utils": {"get_tokenizer": lambda config: tokenizer},
            "nemo_rl.data.datasets": {"AllTaskProcessedDataset": self.dataset},
            "nemo_rl.data.interfaces": {"TaskDataSpec": types.SimpleNamespace},
            "nemo_rl.data.processors": {"register_processor": lambda name, made: self.calls.update(processor=(name, made))},
            "nemo_rl.distributed": {},
            "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": self.registry},
            "nemo_rl.distributed.virtual_cluster": {"init_ray": lambda: None,
                                                    "PY_EXECUTABLES": types.SimpleNamespace(SYSTEM="python")},
            "nemo_rl.environments.utils": {"create_env": self.create_env, "register_env": self.register_env},
            "nemo_rl.models.generation": {"configure_generation_config": lambda config, tokenizer: config},
        }  # fmt: skip
        for name, members in self.modules.items():
            for i in range(1, name.count(".") + 2):
                package = ".".join(name.split(".")[:i])
                if package not in sys.modules:
                    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
            for member, value in members.items():
                setattr(sys.modules[name], member, value)
        package = sys.modules["nemo_rl.distributed"]
        package.ray_actor_environment_registry = sys.modules["nemo_rl.distributed.ray_actor_environment_registry"]
        self.logger = logger
        monkeypatch.setattr(tree, "installed", lambda: version)

    def master_config(self, **config):
        grpo = types.SimpleNamespace(**config["grpo"])
        return types.SimpleNamespace(**{**config, "grpo": grpo})

    def register_env(self, env_name, actor_class_fqn):
        self.calls["env_class"] = actor_class_fqn

    def create_env(self, env_name, **named):
        (name, value), *rest = named.items()
        assert not rest and name == {"v0.5.0": "env_configs", "v0.8.0": "env_config"}[self.version]
        self.calls["environment"] = value[env_name] if self.version == "v0.5.0" else value
        return "environment"

    def dataset(self, dataset, tokenizer, default_task_data_spec, task_data_processors, max_seq_length=None):
        spec, process = task_data_processors[dataset[0]["task_name"]]
        return [process(row, spec, tokenizer, max_seq_length, i) for i, row in enumerate(dataset)]

    def setup(self, master_config, tokenizer, dataset, val_dataset):
        self.calls["datasets"] = (dataset, val_dataset)
        state = {"total_steps": 1} if self.version == "v0.5.0" else types.SimpleNamespace(total_steps=1)
        generation = types.SimpleNamespace(shutdown=lambda: self.calls.update(generation_shut=True))
        head = ("policy", generation) if self.version == "v0.5.0" else ("policy", generation, "no gym")
        tail = () if self.version == "v0.5.0" else ({}, {})
        return (*head, "cluster", "loader", "held out", "loss", self.logger, Checkpointer(), state, master_config, *tail)

    def grpo_train(self, policy, policy_generation, dataloader, val_dataloader, tokenizer, loss_fn, task_to_env, val_task_to_env,
                   logger, checkpointer, grpo_save_state, master_config):  # fmt: skip
        assert (policy, dataloader, val_dataloader, loss_fn) == ("policy", "loader", "held out", "loss")
        assert task_to_env == val_task_to_env == {"rewards": "environment"}
        logger.log_metrics({"accuracy": 0.25, "avg_length": 9.0}, 1, prefix="validation")
        figures = {"loss": self.calls.get("loss", 0.1), "reward": 0.5, "kl_penalty": 0.01, "approx_entropy": 1.5,
                   "mean_gen_tokens_per_sample": 12.0, "unknown": [1]}  # fmt: skip
        logger.log_metrics(figures, 2, prefix="train")
        logger.log_metrics({"x": 1}, 2, prefix="performance")
        timing = {"total_step_time": 4.0, "generation": 2.5, "policy_training": 1.0, "valid_tokens_per_sec_per_gpu": 100.0}
        logger.log_metrics(timing, 2, prefix="timing/train", step_finished=True)


class Checkpointer:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class TestDriver:
    @pytest.fixture(params=["v0.5.0", "v0.8.0"])
    def fake(self, request, monkeypatch, tokenizer):
        return FakeNemoRl(request.param, monkeypatch, tokenizer)

    def options(self, fake, tmp_path, **changes):
        paths = emit.Paths(
            "/m", write_rows(tmp_path / "train.jsonl"), write_rows(tmp_path / "held.jsonl", ROWS[:1]), str(tmp_path)
        )
        plan = planned("8b", **{"prompts": 4, "group": 2, **changes})
        config = engine.write(tmp_path, engine.configuration(plan, LLAMA["8b"].architecture, paths, fake.version))
        assert config == tmp_path / emit.FILE
        return train.Options(str(tmp_path), fake.version)

    def test_a_run(self, fake, tmp_path):
        options = self.options(fake, tmp_path)
        (tmp_path / run_folder.METRICS).write_text('{"step": 1, "loss": 9}\n{"step": 2, "loss": 9}\n')  # 2 after the checkpoint
        train.train(options)
        lines = [json.loads(line) for line in (tmp_path / run_folder.METRICS).read_text().splitlines()]
        assert all(line.pop("time") for line in lines[1:])
        assert lines == [
            {"step": 1, "loss": 9},
            {"step": 1, "val_reward": 0.25, "val_length": 9.0},
            {"step": 2, "loss": 0.1, "reward": 0.5, "kl": 0.01, "entropy": 1.5, "length": 12.0, "step_time": 4.0,
             "generation_time": 2.5, "training_time": 1.0, "tokens_per_s": 800.0},
        ]  # fmt: skip
        assert run_folder.read_status(tmp_path)["phase"] == "finished"
        assert fake.log == [("validation", 1), ("train", 2), ("performance", 2), ("timing/train", 2)]  # NeMo-RL's own go on
        training, held_out = fake.calls["datasets"]
        assert len(training) == 4 and len(held_out) == 1 and held_out[0]["extra_env_info"]["answer"] == "0"
        assert fake.calls["env_class"] == emit.ENVIRONMENT_CLASS and fake.registry == {emit.ENVIRONMENT_CLASS: "python"}
        assert fake.calls["processor"] == (emit.PROCESSOR, problems.process)
        assert fake.calls["environment"]["reward"] == "math"
        assert fake.calls.get("generation_shut", False) is (fake.version == "v0.8.0")

    def test_saving_before_a_time_limit(self, fake, tmp_path):
        """Two of 20 steps are made when NeMo-RL's clock ends the run: it may be continued."""
        train.train(dataclasses.replace(self.options(fake, tmp_path), save_within=90061))
        status = run_folder.read_status(tmp_path)
        assert (status["phase"], status["step"], status["signal"]) == ("stopped", 2, "SIGUSR1")
        assert train._clock(90061) == "01:01:01:01" and train._clock(-5) == "00:00:00:00"

    def test_a_loss_that_is_no_number(self, fake, tmp_path):
        fake.calls["loss"] = float("nan")
        with pytest.raises(RunError, match="the loss of step 2 is nan"):
            train.train(self.options(fake, tmp_path))
        status = run_folder.read_status(tmp_path)
        assert status["phase"] == "failed" and status["exit_code"] == 1 and "the loss of step 2" in status["message"]

    def test_fewer_problems_than_a_step_takes(self, fake, tmp_path):
        with pytest.raises(UserError, match="train.jsonl has 4 problems, and a step takes 8: prompts=4"):
            train.train(self.options(fake, tmp_path, prompts=8))
        assert run_folder.read_status(tmp_path)["exit_code"] == 2

    def test_a_file_that_was_changed_by_hand(self, fake, tmp_path):
        options = self.options(fake, tmp_path)
        path = tmp_path / emit.FILE
        path.write_text(path.read_text().replace("val_period:", "val_perod:"))
        with pytest.raises(UserError, match="nemo_rl.grpo.val_perod is no key"):
            train.train(options)


def test_the_driver_needs_nemo_rl(tmp_path):
    paths = emit.Paths("/m", "/t", None, str(tmp_path))
    engine.write(tmp_path, engine.configuration(planned(), LLAMA["8b"].architecture, paths, "v0.8.0"))
    done = subprocess.run(
        [sys.executable, "-m", "nemo_ext.grpo.nemo_rl.train", f"run={tmp_path}", "version=v0.8.0"],
        capture_output=True, text=True, cwd=engine.ROOT,
    )  # fmt: skip
    assert (
        done.returncode == 2 and done.stderr == "error: NeMo-RL is not installed here: this command runs inside its container\n"
    )
