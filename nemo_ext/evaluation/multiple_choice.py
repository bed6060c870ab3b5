"""Multiple choice by likelihood: which answer does the model find likeliest, without being asked to write one.

letter  the question with its choices as A, B, C, ...; the letters' likelihoods are compared (MMLU, C-Eval, CMMLU)
text    the question alone; the likelihoods of the choices' own texts are compared, each divided by its bytes (UTF-8)

Examples before the question are of its subject: from `dev` in order, or without one the first of the file itself, which are not
scored then. Chinese questions get Chinese words around them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_ext.errors import UserError
from nemo_ext.evaluation import results
from nemo_ext.evaluation.model import Model, Progress, Request
from nemo_ext.evaluation.questions import LETTERS, Question
from nemo_ext.evaluation.results import Metric, Result, Table
from nemo_ext.evaluation.text_metrics import is_chinese

SCORES = {"letter": ("letter",), "text": ("text",), "both": ("letter", "text")}
EXAMPLES = 3
TOGETHER = 256  # questions whose token ids are held at a time


@dataclass(frozen=True)
class Words:
    """What stands around a question."""

    header: str
    header_of: str  # with a subject
    answer: str
    space: str  # between `answer` and what follows


ENGLISH = Words(
    "The following are multiple choice questions (with answers).\n\n",
    "The following are multiple choice questions (with answers) about {subject}.\n\n",
    "Answer:",
    " ",
)
CHINESE = Words(
    "以下是单项选择题，请直接给出正确答案的选项。\n\n",
    "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
    "答案：",
    "",
)


@dataclass(frozen=True)
class Exam:
    """Questions to score, and for each subject the examples that stand before them."""

    questions: list[Question]
    examples: dict[str, list[Question]]
    words: Words
    about: str


def exam(questions: list[Question], shots: int = 0, dev: list[Question] | None = None, limit: int | None = None) -> Exam:
    """Choose or split off the examples, and of what is left the first `limit`. Raises UserError for a subject with too few."""
    words = CHINESE if sum(is_chinese(q.text) for q in questions) * 2 > len(questions) else ENGLISH
    if not shots:
        return Exam(questions[:limit], {}, words, "no examples before the question")
    groups: dict[str, list[Question]] = {}
    for question in questions if dev is None else dev:
        groups.setdefault(question.subject, []).append(question)
    if dev is not None and set(groups) == {""}:  # one set of examples for all
        groups = {subject: groups[""] for subject in {q.subject for q in questions}}
    for subject in dict.fromkeys(q.subject for q in questions):
        if len(groups.get(subject, ())) < shots + (dev is None):
            what = f"{len(groups.get(subject, ()))} {'questions' if dev is None else 'examples in dev='}"
            raise UserError(f"shots={shots}: {what}{f' of {subject}' if subject else ''} are too few: lower shots=")
    examples = {subject: group[:shots] for subject, group in groups.items()}
    if dev is not None:
        return Exam(questions[:limit], examples, words, f"{shots} examples from dev= before the question")
    used = {id(question) for group in examples.values() for question in group}
    about = f"the first {shots} questions{' of each subject' if len(groups) > 1 else ''} are the examples, and not scored"
    return Exam([q for q in questions if id(q) not in used][:limit], examples, words, about)


def prompt(exam: Exam, question: Question, letters: bool, skip: int = 0) -> str:
    """What the model reads before an answer; `skip` leaves out that many examples."""
    words = exam.words
    subject = question.subject.replace("_", " ")
    examples = exam.examples.get(question.subject, [])[skip:]
    head = (words.header_of.format(subject=subject) if subject else words.header) if letters else ""
    parts = [f"{_asked(words, q, letters)}{words.space}{_answer(q, letters)}\n\n" for q in examples]
    return "".join([head, *parts, _asked(words, question, letters)])


def evaluate(model: Model, exam: Exam, score: str = "letter", *, progress: Progress | None = None) -> Result:
    """Accuracy of `model`. `score` is of SCORES. `progress` counts questions, once for each way of scoring.

    Raises UserError for a question that does not fit the model's context without any example.
    """
    metrics, tables, examples, shortened = [], [], [], 0
    for number, kind in enumerate(SCORES[score]):
        scores: list[list[float]] = []  # of each question's choices
        for begin in range(0, len(exam.questions), TOGETHER):
            chosen = exam.questions[begin : begin + TOGETHER]
            before = number * len(exam.questions) + begin
            found, cut = _scores(model, exam, chosen, kind, (lambda done, b=before: progress(b + done)) if progress else None)
            scores += found
            shortened += cut
        picks = [max(range(len(row)), key=row.__getitem__) for row in scores]
        hits = [pick == q.answer for pick, q in zip(picks, exam.questions, strict=True)]
        name = "accuracy" if kind == "letter" else "accuracy by text"
        metrics.append(results.share(name, hits))
        tables += _subjects(exam.questions, hits, name)
        if not examples:
            examples = [_example(q, pick, row) for q, pick, row in zip(exam.questions, picks, scores, strict=True)][:EXAMPLES]
    return Result(metrics, _about(exam, score, shortened), tables, examples)


def _scores(
    model: Model, exam: Exam, questions: Sequence[Question], kind: str, progress: Progress | None
) -> tuple[list[list[float]], int]:
    """The (normalised) log-likelihood of every choice of every question, and how many questions had to do with fewer examples."""
    groups = [_requests(model, exam, question, kind == "letter") for question in questions]
    requests = [request for group, _ in groups for request in group]
    each = len(requests) / len(questions)
    found = iter(model.log_likelihoods(requests, (lambda done: progress(int(done / each))) if progress else None))
    scores = [[float(next(found).sum()) for _ in group] for group, _ in groups]
    if kind == "text":
        scores = [
            [value / len(choice.encode()) for value, choice in zip(row, question.choices, strict=True)]
            for row, question in zip(scores, questions, strict=True)
        ]
    return scores, sum(skipped > 0 for _, skipped in groups)


def _requests(model: Model, exam: Exam, question: Question, letters: bool) -> tuple[list[Request], int]:
    """A request for each choice, all scored from the first token in which any differs from the prompt, and how many examples
    had to go for them to fit."""
    shots = len(exam.examples.get(question.subject, []))
    for skip in range(shots + 1):
        before = prompt(exam, question, letters, skip)
        context = [model.start_id, *model.encode(before)]
        wholes = []
        for i, choice in enumerate(question.choices):
            answer = LETTERS[i] if letters else choice
            wholes.append([model.start_id, *model.encode(before + exam.words.space + answer)])
        if max(map(len, wholes)) <= model.context + 1:
            start = min(min(_common(context, whole), len(whole) - 1) for whole in wholes)
            return [Request(tuple(whole), start) for whole in wholes], skip
    raise UserError(f"{question.place}: the question has {max(map(len, wholes))} tokens, {model.name} {model.context} positions")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the start are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _asked(words: Words, question: Question, letters: bool) -> str:
    listed = "".join(f"{LETTERS[i]}. {choice}\n" for i, choice in enumerate(question.choices)) if letters else ""
    return f"{question.text}\n{listed}{words.answer}"


def _answer(question: Question, letters: bool) -> str:
    return LETTERS[question.answer] if letters else question.choices[question.answer]


def _subjects(questions: list[Question], hits: list[bool], name: str) -> list[Table]:
    """A table of the subjects, where there are several, with the mean over them."""
    groups: dict[str, list[bool]] = {}
    for question, hit in zip(questions, hits, strict=True):
        groups.setdefault(question.subject, []).append(hit)
    if len(groups) < 2:
        return []
    found: dict[str, Metric] = {subject or "(none)": results.share(name, group) for subject, group in sorted(groups.items())}
    rows: list[list] = [[subject, m.value, m.low, m.high, m.count] for subject, m in found.items()]
    macro = math.fsum(m.value for m in found.values()) / len(found)
    rows.append(["mean of the subjects", macro, None, None, len(questions)])
    return [Table(f"{name} by subject", ["subject", name, "low", "high", "questions"], rows)]


def _example(question: Question, pick: int, scores: list[float]) -> dict[str, str]:
    options = zip(LETTERS, question.choices, scores, strict=False)
    listed = "\n".join(f"{letter}. {choice}  ({score:.3f})" for letter, choice, score in options)
    return {"prompt": question.text, "reference": LETTERS[question.answer], "answer": f"{LETTERS[pick]}\n{listed}"}


def _about(exam: Exam, score: str, shortened: int) -> list[str]:
    how = {
        "letter": "the likeliest letter after the question and its choices",
        "text": "the choice of the highest likelihood per byte after the question alone",
    }
    chance = sum(1 / len(q.choices) for q in exam.questions) / len(exam.questions)
    about = [f"{len(exam.questions):,} questions; guessing gives {chance:.1%}; {exam.about}"]
    about += [how[kind] for kind in SCORES[score]]
    if shortened:
        about.append(f"{shortened} questions with fewer examples, to fit the model's context")
    return about
