"""How close generated texts are to their references: BLEU, ROUGE-L, exact match, and the last number.

BLEU is sacrebleu's corpus BLEU (Post, 2018) and ROUGE-L the mean F-measure of rouge-score (Lin, 2004), without stemming, the best
reference's where there are several. Chinese is cut into characters for both; rouge-score's own tokenizer would drop it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from nemo_ext.errors import UserError
from nemo_ext.evaluation import intervals, results
from nemo_ext.evaluation.results import Metric

_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_PIECES = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-z0-9]+")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])(?<!\d\.)-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:/\d+)?|\.\d+)")
ORDER = 4  # of BLEU's n-grams


def is_chinese(text: str) -> bool:
    """Whether the text has Chinese characters."""
    return _CHINESE.search(text) is not None


def measure(name: str, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Metric | None, list[float | None]]:
    """The metric `name` (of METRICS) over all outputs, and each one's own value.

    None where nothing can be measured: no reference holds a number.
    """
    return METRICS[name](outputs, references)


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Metric, list[float]]:
    """Corpus BLEU in [0, 100], and each output's sentence BLEU."""
    scorer = _bleu(_tokenizer(references))
    each = [scorer.sentence_score(output, list(refs)) for output, refs in zip(outputs, references, strict=True)]
    sums = np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in each], dtype=np.float64)
    corpus = functools.partial(_corpus_bleu, scorer)
    low, high = intervals.bootstrap(sums, lambda totals: np.array([corpus(row) for row in totals])) or (None, None)
    metric = Metric("BLEU", corpus(sums.sum(0)), low, high, count=len(each), interval="bootstrap over prompts")
    return metric, [score.score for score in each]


def rouge(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Metric, list[float]]:
    """Mean ROUGE-L F-measure in [0, 1], and each output's."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Characters() if _tokenizer(references) == "zh" else None)
    each = [scorer.score_multi(refs, out)["rougeL"].fmeasure for out, refs in zip(outputs, references, strict=True)]
    return results.mean("ROUGE-L", each, "prompts"), each


def exact(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Metric, list[float]]:
    """Share of outputs that are equal to a reference, but for white space."""
    hits = [any(_spaced(out) == _spaced(ref) for ref in refs) for out, refs in zip(outputs, references, strict=True)]
    return results.share("exact match", hits), [float(hit) for hit in hits]


def numeric(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Metric | None, list[float | None]]:
    """Share of outputs whose last number is a reference's last number, of those whose reference has one."""
    each: list[float | None] = []
    for output, refs in zip(outputs, references, strict=True):
        wanted = {number for ref in refs if (number := last_number(ref)) is not None}
        each.append(float(last_number(output) in wanted) if wanted else None)
    hits = [value == 1.0 for value in each if value is not None]
    return (results.share("numeric match", hits) if hits else None), each


METRICS: dict[str, Callable] = {"bleu": bleu, "rouge": rouge, "exact": exact, "numeric": numeric}


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: 1,234.50 and 1234.5 are equal, so are 1/2 and 0.5. None if there is none."""
    for match in reversed(list(_NUMBER.finditer(text))):
        numerator, _, denominator = match[0].replace(",", "").partition("/")
        if not denominator or int(denominator):
            return Fraction(numerator) / int(denominator or 1)
    return None


def require_packages() -> None:
    """Raises UserError where sacrebleu or rouge-score is not installed."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: run `make setup`") from None


@functools.lru_cache(maxsize=2)
def _bleu(tokenizer: str):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer, effective_order=True)  # for the scores of single outputs; their counts are the same


def _corpus_bleu(scorer, totals: np.ndarray) -> float:
    """BLEU of summed counts [matches of each order, n-grams of each order, output length, reference length]."""
    counts = [int(round(x)) for x in totals]
    score = scorer.compute_bleu(
        counts[:ORDER], counts[ORDER : 2 * ORDER], counts[-2], counts[-1],
        smooth_method=scorer.smooth_method, smooth_value=scorer.smooth_value, effective_order=False,
    )  # fmt: skip
    return score.score


def _tokenizer(references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's tokenizer for the references: "zh" if most have Chinese characters, else "13a"."""
    chinese = sum(any(is_chinese(ref) for ref in refs) for refs in references)
    return "zh" if chinese * 2 > len(references) else "13a"


class _Characters:
    """rouge-score's tokenizer for Chinese: characters, and words of Latin letters."""

    def tokenize(self, text: str) -> list[str]:
        return _PIECES.findall(text.lower())


def _spaced(text: str) -> str:
    return " ".join(text.split())
