"""Evaluates models on files of texts, questions and prompts, and writes one report.

python launchers/evaluate.py model=hf:FOLDER tasks=[ppl:notes.md,mcq:mmlu/test] dev=mmlu/dev shots=5 out=evaluation
python launchers/evaluate.py model=[hf:BASE,nemo:RUN] tasks=[generate:gsm8k.jsonl@numeric] out=evaluation
python launchers/evaluate.py model=[hf:BASE,lora:FOLDER] tasks=ppl:notes.md out=evaluation
python launchers/evaluate.py model=[hf:A,hf:B] tasks=judge:prompts.jsonl judge_url=http://HOST/v1 judge_model=NAME out=evaluation

Tasks that are finished are not run again when the command is given again. Exit codes: 0 complete, 1 failed, 2 bad input.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_ext import run_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.disk import held
from nemo_ext.errors import UserError
from nemo_ext.evaluation import results, tasks
from nemo_ext.evaluation.results import Result, Store
from nemo_ext.evaluation.tasks import Task
from nemo_ext.progress import bar
from nemo_ext.quiet import quiet

if TYPE_CHECKING:
    from nemo_ext.evaluation.judge import Judge
    from nemo_ext.evaluation.model import Answer, Model

ABOUT = "Evaluates models on files of texts, questions and prompts, and writes one report."
EXAMPLE = "python launchers/evaluate.py model=hf:FOLDER tasks=[ppl:notes.md,mcq:questions.csv] out=evaluation"
KINDS = ("hf", "nemo", "lora")
PEFT_CONFIG = "adapter_config.json"
KIND_NAMES = {"lora": "LoRA", "canonical_lora": "LoRA", "dora": "DoRA", "canonical_dora": "DoRA", "moe_dora": "MoE-DoRA",
              "adalora": "AdaLoRA", "fourierft": "FourierFT"}  # fmt: skip
EXPORTED = ".exported"
REPLIES = "judge.jsonl"


@dataclass
class Options:
    """The command's keys."""

    model: Any = key(NO_DEFAULT, "hf:FOLDER, hf:NAME (in Hugging Face's local cache), nemo:RUN or lora:FOLDER (PEFT's), or a "
                     "list; others are compared with the first")  # fmt: skip
    tasks: Any = key(NO_DEFAULT, "ppl:FILE, mcq:FILE, generate:FILE, judge:FILE or lm_eval:NAME, or a list")
    out: str = key(NO_DEFAULT, "folder of the report")
    base: str | None = key(None, "the model that adapters are for: hf:FOLDER or hf:NAME", auto="what each adapter names")
    nf4: bool | None = key(None, "adapters on their base in NF4, as QLoRA trained them", auto="of runs of qlora; else not")
    limit: int | None = key(None, "documents, questions or prompts of a task, from the first", auto="all")
    batch: int | None = key(None, "sequences at once", auto="as many as fit, at most 16")
    dtype: str | None = key(None, "of the weights", choices=("float32", "bfloat16", "float16"),
                            auto="the checkpoint's on a GPU, float32 on a CPU")  # fmt: skip
    text_key: str = key("text", "the field or column of the text", group="ppl")
    window: int | None = key(None, "what the model sees at once", unit="tokens", auto="its context, at most 2048")
    stride: int | None = key(None, "between windows; window= makes them fixed", unit="tokens", auto="half the window")
    shots: int | None = key(None, "examples before a question", auto="0; lm_eval the task's own", group="mcq and lm_eval")
    dev: str | None = key(None, "file or folder of the examples", auto="the first questions of each subject, not scored then")
    score: str = key("letter", "what is compared: the letters' likelihood, the choices' own text's, or both",
                     choices=("letter", "text", "both"))  # fmt: skip
    metrics: Any = key("all", "bleu, rouge, exact, numeric, a list of them, or all; for one file generate:FILE@exact+numeric",
                       group="generate and judge")  # fmt: skip
    max_new_tokens: int = key(256, "longest answer", unit="tokens")
    temperature: float = key(0.0, "0 is greedy")
    seed: int = key(0, "of sampling")
    stop: Any = key(None, "text or list of texts before which an answer ends", auto="none")
    chat: bool | None = key(None, "prompts through the chat template", auto="where the tokenizer has one")
    judge_url: str | None = key(None, "address of an OpenAI-compatible endpoint, http://HOST/v1", auto="none", group="judge")
    judge_model: str | None = key(None, "its name for the judging model", auto="none")
    judge_key_env: str | None = key(None, "environment variable with the key", auto="OPENAI_API_KEY, without a key if unset")
    rubric: str | None = key(None, "file with the criteria", auto="correct, complete, clear")
    pairwise: bool = key(True, "of several models, also judge each against the first, in both orders")
    judge_temperature: float | None = key(0.0, "null leaves it to the endpoint", auto="the endpoint's")
    judge_timeout: float = key(120.0, "for a reply", unit="seconds")
    judge_retries: int = key(5, "after a failure that may pass")
    judge_workers: int = key(4, "requests at once")


@dataclass
class Candidate:
    """A model to evaluate. It is loaded, and a run exported, when its first task needs it."""

    name: str
    kind: str
    folder: Path
    key: str
    adapter: Adapter | None = None
    loaded: Model | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter before it is loaded: its kind, the base's folder, and how the base is rounded for it."""

    kind: str
    base: Path
    double_quant: bool | None = None  # of a base in NF4; None: it is not

    def __str__(self) -> str:
        return f"{self.kind} on {self.base}" + (" in NF4" if self.double_quant is not None else "")


def command(options: Options) -> None:
    """Run the tasks that are not finished, and write the report."""
    evaluation = Evaluation(options)
    with held(evaluation.out), quiet():
        evaluation.run()


class Evaluation:
    """All tasks on all models. Everything that can be checked without a model is checked on construction."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.out = Path(options.out).expanduser()
        self.tasks = tasks.parse(options.tasks, options.metrics)
        self.stop = tasks.as_list("stop", options.stop) if options.stop is not None else []
        self._check()
        self.content = {task.name: self._read(task) for task in self.tasks}
        self.candidates = _candidates(options.model, options.base, options.nf4)
        self.store = Store(self.out)
        self.rubric = self._rubric()

    def run(self) -> None:
        """Evaluate and report. Models are in memory one at a time."""
        from nemo_ext.evaluation import report

        found: dict[str, dict[str, Result]] = {task.name: {} for task in self.tasks}
        for candidate in self.candidates:
            try:
                for task in self.tasks:
                    found[task.name][candidate.name] = self._task(task, candidate)
                candidate.facts = self._facts(candidate)
            finally:
                self._release(candidate)
        pairs = self._pairs()
        complete = report.Report({c.name: c.facts for c in self.candidates}, found, pairs, self._settings())
        report.write(self.out, complete)
        print("\n".join(report.lines(complete)))
        print(f"{self.out / report.MARKDOWN}, {report.JSON}, {report.PLOT}")

    def _check(self) -> None:
        """Refuse what no model is needed to see."""
        from nemo_ext.evaluation import harness, text_metrics

        o, kinds = self.options, {task.kind for task in self.tasks}
        for name in ("limit", "batch", "max_new_tokens", "window", "stride"):
            if (value := getattr(o, name)) is not None and value < 1:
                raise UserError(f"{name}={value} must be 1 or more")
        if o.window and o.stride and o.stride > o.window:
            raise UserError(f"stride={o.stride} is more than window={o.window}: tokens between the windows would be left out")
        if o.temperature < 0:
            raise UserError(f"temperature={o.temperature} must be 0 or more")
        if o.shots is not None and o.shots < 0:
            raise UserError(f"shots={o.shots} must be 0 or more")
        if o.dev and not o.shots:
            raise UserError("dev= is where the examples come from: it goes with shots=")
        if "generate" in kinds:
            text_metrics.require_packages()
        for task in self.tasks:
            if task.kind == "lm_eval":
                harness.require(task.what)
        if "lm_eval" in kinds:
            harness.work_offline()
        if "judge" in kinds:
            for name in ("judge_url", "judge_model"):
                if not getattr(o, name):
                    raise UserError(f"{name}= is missing: judge: tasks need an OpenAI-compatible endpoint and its model's name")
            self.endpoint = self._endpoint()

    def _read(self, task: Task) -> Any:
        """The task's documents, questions or prompts."""
        from nemo_ext.evaluation import generation, multiple_choice, perplexity, questions

        o = self.options
        if task.kind == "ppl":
            return perplexity.documents(task.source, o.text_key, o.limit)
        if task.kind == "mcq":
            dev = questions.read(tasks.files("mcq", o.dev, f"dev={o.dev}")) if o.dev else None
            return multiple_choice.exam(questions.read(task.source), o.shots or 0, dev, o.limit)
        if task.kind in ("generate", "judge"):
            return generation.read(task.source, o.limit, need_references=task.kind == "generate")
        return None

    def _task(self, task: Task, candidate: Candidate) -> Result:
        """What `task` finds out about a model, now or earlier."""
        name = f"{candidate.name}.{task.name}"
        kept = self.store.find(name, key := self._key(task, candidate))
        if kept is not None:
            print(f"{task.name} of {candidate.name}: finished earlier")
            return Result.from_dict(kept)
        result = {"ppl": self._ppl, "mcq": self._mcq, "generate": self._generate, "judge": self._judge, "lm_eval": self._lm_eval}[
            task.kind
        ](task, candidate)
        self.store.keep(name, key, result.to_dict())
        return result

    def _ppl(self, task: Task, candidate: Candidate) -> Result:
        from nemo_ext.evaluation import perplexity

        texts, model = self.content[task.name], self._model(candidate)
        with bar(f"{task.name} of {candidate.name}", perplexity.size_of(texts), "bytes") as progress:
            return perplexity.evaluate(model, texts, window=self.options.window, stride=self.options.stride, progress=progress)

    def _mcq(self, task: Task, candidate: Candidate) -> Result:
        from nemo_ext.evaluation import multiple_choice

        exam, model = self.content[task.name], self._model(candidate)
        total = len(exam.questions) * len(multiple_choice.SCORES[self.options.score])
        with bar(f"{task.name} of {candidate.name}", total, "questions") as progress:
            return multiple_choice.evaluate(model, exam, self.options.score, progress=progress)

    def _generate(self, task: Task, candidate: Candidate) -> Result:
        from nemo_ext.evaluation import generation

        answers, about = self._answers(task, candidate)
        result, rows = generation.score(self.content[task.name], answers, task.metrics, about)
        self.store.write_outputs(f"{candidate.name}.{task.name}", rows)
        return result

    def _judge(self, task: Task, candidate: Candidate) -> Result:
        from nemo_ext.evaluation import judging

        prompts, (answers, about) = self.content[task.name], self._answers(task, candidate)
        with bar(f"rating {task.name} of {candidate.name}", len(prompts), "answers") as progress:
            result, rows = judging.rate(self._judge_client(), prompts, [a.text for a in answers], self.rubric, progress)
        self.store.write_outputs(f"{candidate.name}.{task.name}", rows)
        return Result(result.metrics, [*result.about, *about], result.tables, result.examples)

    def _lm_eval(self, task: Task, candidate: Candidate) -> Result:
        from nemo_ext.evaluation import harness

        model = self._model(candidate)
        with bar(f"{task.name} of {candidate.name}", 1, "tasks") as progress:
            result = harness.evaluate(model, task.what, shots=self.options.shots, limit=self.options.limit)
            progress(1)
        return result

    def _answers(self, task: Task, candidate: Candidate) -> tuple[list[Answer], list[str]]:
        """What the model writes to the task's prompts, and how; generate and judge share them."""
        from nemo_ext.evaluation import generation
        from nemo_ext.evaluation.model import Answer

        o, prompts = self.options, self.content[task.name]
        wanted = dict(max_new_tokens=o.max_new_tokens, temperature=o.temperature, seed=o.seed, stop=self.stop, chat=o.chat)
        decides = [candidate.key, [p.messages for p in prompts], wanted, o.dtype, o.batch if o.temperature else None]

        def generate() -> dict[str, Any]:
            model = self._model(candidate)
            with bar(f"answers of {candidate.name} to {Path(task.what).name}", len(prompts), "prompts") as progress:
                found = generation.answers(model, prompts, progress=progress, **wanted)
            templated = bool(model.tokenizer.chat_template) if o.chat is None else o.chat
            return {"answers": [vars(a) for a in found], "templated": templated}

        kept = self.store.find_or(f"{candidate.name}.answers:{task.what}", results.digest(*decides), generate)
        how = f"sampled at temperature {o.temperature:g}, seed {o.seed}" if o.temperature else "greedy"
        through = "through the chat template" if kept["templated"] else "as they are, without a chat template"
        about = [f"prompts {through}; answers {how}, of at most {o.max_new_tokens} tokens"]
        return [Answer(**a) for a in kept["answers"]], about

    def _pairs(self) -> dict[str, dict[str, Result]]:
        """Each model judged against the first, by judge task."""
        from nemo_ext.evaluation import judging

        found: dict[str, dict[str, Result]] = {}
        judged = [task for task in self.tasks if task.kind == "judge"] if self.options.pairwise else []
        for task in judged:
            base, *others = self.candidates
            for other in others:
                name = f"{other.name}.against.{base.name}.{task.name}"
                decides = results.digest(self._key(task, base), self._key(task, other))

                def compare(task=task, base=base, other=other, name=name) -> dict[str, Any]:
                    prompts, answers = self.content[task.name], []
                    for candidate in (base, other):
                        answers.append([answer.text for answer in self._answers(task, candidate)[0]])
                        self._release(candidate)
                    with bar(f"comparing {task.name} of {other.name}", 2 * len(prompts), "verdicts") as progress:
                        result, rows = judging.compare(self._judge_client(), prompts, *answers, self.rubric, progress)
                    self.store.write_outputs(name, rows)
                    return result.to_dict()

                result = Result.from_dict(self.store.find_or(name, decides, compare))
                found.setdefault(task.name, {})[other.name] = result
        return found

    def _key(self, task: Task, candidate: Candidate) -> str:
        """A hash of all that decides the result of a task."""
        o = self.options
        generating = ("max_new_tokens", "temperature", "seed", "stop", "chat")
        names = {
            "ppl": ("text_key", "window", "stride"),
            "mcq": ("shots", "score"),
            "generate": generating,
            "judge": (*generating, "judge_url", "judge_model", "judge_temperature"),
            "lm_eval": ("shots", "limit"),
        }[task.kind]
        settings = {name: getattr(o, name) for name in ("dtype", *names)}
        sampling = o.batch if task.kind in ("generate", "judge") and o.temperature else None
        rubric = self.rubric if task.kind == "judge" else None
        return results.digest(task.kind, task.metrics, candidate.key, self._content_key(task), settings, sampling, rubric)

    def _content_key(self, task: Task) -> Any:
        """A hash of the task's content."""
        if task.kind == "lm_eval":
            from nemo_ext.evaluation import harness

            return task.what, results.content_digest(harness.files(task.what))
        content = self.content[task.name]
        return results.digest(content if task.kind == "ppl" else repr(content))

    def _model(self, candidate: Candidate) -> Model:
        """The model in memory."""
        if candidate.loaded is None:
            from nemo_ext import platform
            from nemo_ext.evaluation.model import Model

            platform.activate()
            from transformers.utils import logging as hf_logging

            hf_logging.set_verbosity_error()
            hf_logging.disable_progress_bar()
            shutil.rmtree(self.out / EXPORTED, ignore_errors=True)  # of a command that was killed
            if candidate.adapter:
                found = self._adapted(candidate, candidate.adapter)
            else:
                found = {
                    "folder": candidate.folder if candidate.kind == "hf" else self._exported(candidate.folder, candidate.name)
                }
            candidate.loaded = Model(name=candidate.name, dtype=self.options.dtype, batch=self.options.batch, **found)
        return candidate.loaded

    def _adapted(self, candidate: Candidate, adapter: Adapter) -> dict[str, Any]:
        """The arguments of `Model` for an adapter: its base, its tokenizer, and how it is put in."""
        from conversion.lora import experts, from_nemo
        from conversion.lora import nemo as lora
        from nemo_ext.evaluation import adapted

        base = adapter.base
        if not (base / "config.json").is_file():
            base = self._exported(base, f"the base of {candidate.name}")
        if candidate.kind == "lora":
            tokenizer, peft, routed = candidate.folder, candidate.folder, None
        else:
            from conversion import nemo_folder

            tokenizer = nemo_folder.find(candidate.folder, adapter=True).tokenizer
            peft = routed = None
            if adapter.kind == "MoE-DoRA":
                routed = experts.of_checkpoint(*lora.find(candidate.folder, None))
            else:
                peft = from_nemo.convert(candidate.folder, self.out / EXPORTED / "lora")
        if tokenizer and not any((tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            tokenizer = None

        def adapt(network: Any) -> Any:
            if adapter.double_quant is not None:
                adapted.round_to_nf4(network, adapter.double_quant)
            return adapted.with_experts(network, routed) if routed else adapted.with_peft(network, peft)

        return {"folder": base, "tokenizer": tokenizer, "adapt": adapt}

    def _release(self, candidate: Candidate) -> None:
        """Free what `_model` took."""
        if candidate.loaded:
            candidate.loaded.close()
            candidate.loaded = None
        shutil.rmtree(self.out / EXPORTED, ignore_errors=True)

    def _exported(self, folder: Path, name: str) -> Path:
        """A run's newest checkpoint as a Hugging Face folder, gone when its tasks are done."""
        from conversion import nemo_to_hf

        with bar(f"exporting {name}", unit="B") as progress:
            return nemo_to_hf.export(folder, self.out / EXPORTED / "hf", progress=progress)

    def _facts(self, candidate: Candidate) -> dict[str, Any]:
        """What the report says of a model; kept, for a later command may not load it."""
        name = f"{candidate.name}.model"
        if candidate.loaded is None and (kept := self.store.find(name, candidate.key)):
            return kept
        facts: dict[str, Any] = {"from": f"{candidate.kind}:{candidate.folder}"}
        if candidate.adapter:
            facts["adapter"] = str(candidate.adapter)
        if candidate.loaded:
            network = candidate.loaded.network
            facts |= {"type": network.config.model_type, "parameters": f"{network.num_parameters():,}"}
            facts |= {"dtype": candidate.loaded.dtype, "device": _device()}
            self.store.keep(name, candidate.key, facts)
        return facts

    def _settings(self) -> dict[str, Any]:
        """The keys that are not at their defaults, and the versions that count."""
        changed = {f: v for f, v in vars(self.options).items() if v != Options.__dataclass_fields__[f].default}
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "sacrebleu", "rouge-score") if _has(p)}
        return changed | {"versions": ", ".join(f"{name} {version}" for name, version in versions.items())}

    def _endpoint(self):
        from nemo_ext.evaluation.judge import Endpoint

        o = self.options
        return Endpoint(
            o.judge_url, o.judge_model, o.judge_key_env, o.judge_temperature, o.judge_timeout, o.judge_retries,
            workers=o.judge_workers,
        )  # fmt: skip

    def _judge_client(self) -> Judge:
        from nemo_ext.evaluation.judge import Judge

        return Judge(self.endpoint, self.out / results.RESULTS / REPLIES)

    def _rubric(self) -> str:
        from nemo_ext.evaluation import judging

        if self.options.rubric is None:
            return judging.RUBRIC
        try:
            text = Path(self.options.rubric).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"rubric={self.options.rubric}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        if not text:
            raise UserError(f"rubric={self.options.rubric}: the file is empty")
        return text


def _candidates(value: Any, base: str | None, nf4: bool | None) -> list[Candidate]:
    """The models of `model=`. Raises UserError for what is none, before any is loaded."""
    found = [_candidate(text, base, nf4) for text in tasks.as_list("model", value)]
    for name, given in (("base", base), ("nf4", nf4)):
        if given is not None and not any(candidate.adapter for candidate in found):
            raise UserError(f"{name}= is of adapters, and no model is one")
    folders = [candidate.folder for candidate in found]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"model=: {folder} is given twice")
    for candidate, name in zip(found, results.distinct(folders), strict=True):
        candidate.name = name
    return found


def _candidate(text: str, base: str | None, nf4: bool | None) -> Candidate:
    kind, separator, name = text.partition(":")
    if not separator or not name or kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.4) if separator and name else []
        raise UserError(f"model={text}: give hf:FOLDER, nemo:RUN or lora:FOLDER{f'; did you mean {near[0]}:?' if near else ''}")
    folder = Path(name).expanduser()
    if kind == "nemo":
        from conversion import nemo_folder

        checkpoint = nemo_folder.find(folder, adapter=True)
        if checkpoint.tokenizer is None:
            raise UserError(f"model={text}: the checkpoint has no tokenizer")
        described = nemo_folder.description(folder) / nemo_folder.ADAPTER
        adapter = _adapter_of_run(text, described, base, nf4) if described.is_file() else None
        return _with_key(Candidate("", kind, folder, results.folder_digest(checkpoint.folder), adapter))
    if kind == "lora":
        return _with_key(Candidate("", kind, folder, results.folder_digest(folder), _adapter_of_peft(text, folder, base, nf4)))
    folder = _hf_folder("model", text)
    if not (folder / "config.json").is_file():
        if (folder / PEFT_CONFIG).is_file():
            raise UserError(f"model={text}: the folder holds a PEFT adapter: lora:{name}")
        raise UserError(f"model={text}: the folder has no config.json; a run of this project is nemo:{name}")
    return _with_key(Candidate("", kind, folder, results.folder_digest(folder)))


def _with_key(candidate: Candidate) -> Candidate:
    """With a key of all that decides what the model computes, where it was that of its own files."""
    beside = candidate.adapter
    about = [str(beside), results.folder_digest(beside.base), beside.double_quant] if beside else []
    return replace(candidate, key=results.digest(candidate.kind, candidate.key, *about))


def _adapter_of_run(text: str, description: Path, base: str | None, nf4: bool | None) -> Adapter:
    """What a run's adapter.json says. Raises UserError for one that cannot be evaluated here."""
    described = run_folder.read_json(description) or {}
    if described.get("senses"):
        raise UserError(f"model={text}: the tasks are of text, and this is an adapter of a model that sees or hears")
    rounded = described.get("nf4")
    if nf4 is not None:
        rounded = (rounded or {"double_quant": True}) if nf4 else None
    kind = KIND_NAMES.get(described.get("kind"), "adapter")
    return Adapter(kind, _base(text, base, described.get("base")), rounded["double_quant"] if rounded else None)


def _adapter_of_peft(text: str, folder: Path, base: str | None, nf4: bool | None) -> Adapter:
    """What a PEFT folder says."""
    if not folder.is_dir():
        raise UserError(f"model={text}: there is no such folder")
    config = run_folder.read_json(folder / PEFT_CONFIG)
    if not config or "peft_type" not in config:
        raise UserError(f"model={text}: the folder has no {PEFT_CONFIG} of PEFT's; a whole model is hf:, a run nemo:")
    kind = "DoRA" if config.get("use_dora") else KIND_NAMES.get(str(config["peft_type"]).lower(), str(config["peft_type"]))
    return Adapter(kind, _base(text, base, config.get("base_model_name_or_path")), True if nf4 else None)


def _base(text: str, given: str | None, named: str | None) -> Path:
    """The folder of an adapter's base: the given one, or that which the adapter names."""
    if given is not None:
        if not given.startswith("hf:"):
            raise UserError(f"base={given}: give hf:FOLDER or hf:NAME")
        return _hf_folder("base", given)
    if not named:
        raise UserError(f"model={text}: the adapter names no base: give base=hf:FOLDER")
    try:
        return _hf_folder("model", f"hf:{named}")
    except UserError:
        raise UserError(f"model={text}: its base {named} is not on this machine: give base=hf:FOLDER") from None


def _hf_folder(option: str, text: str) -> Path:
    """A folder, or the model of this name in Hugging Face's local cache."""
    name = text.partition(":")[2]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from conversion import hub_cache

    if (cached := hub_cache.find(name)) is None:
        raise UserError(f"{option}={text}: no such folder, and no such model in Hugging Face's local cache")
    return cached


def _device() -> str:
    from nemo_ext.platform import hardware

    return hardware.detect().gpus[0].name if hardware.has_cuda() else "CPU"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(Options, command, sys.argv[1:], about=ABOUT, example=EXAMPLE))
