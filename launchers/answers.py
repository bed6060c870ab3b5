"""Held-out questions answered by a model before and after it was tuned, for people to read side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_ext.progress import bar

MAX_NEW_TOKENS = 96


def questions(corpus, tokenizer, count: int) -> list[tuple[list[int], str, str]]:
    """The first `count` held-out samples of a `ChatCorpus`, spread over its sources: (ids of the prompt, its text, the answer).

    The prompt is what stands before the first learnt token, the answer that token and those learnt after it.
    """
    from nemo_ext.data.chat.store import Samples

    found = []
    sides = [Samples(source.heldout_prefix) for source in corpus.sources if source.heldout_prefix]
    places = [(side, number) for number in range(count) for side in sides if number < len(side)]
    for side, number in places[:count]:
        ids, weights = side[number]
        learnt = weights > 0
        start = int(learnt.argmax())
        end = start + int((~learnt[start:]).argmax()) if not learnt[start:].all() else len(ids)
        answer = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        found.append((ids[:start].tolist(), _last_turn(ids[:start], tokenizer), answer))
    return found


def _last_turn(ids, tokenizer) -> str:
    """What was asked last, for people: the longest text between the special tokens that end a prompt."""
    import numpy as np

    special = np.flatnonzero(np.isin(ids, tokenizer.all_special_ids))
    parts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in np.split(ids, special)]
    return max(parts[-4:], key=len).removeprefix("user\n")


def side_by_side(corpus, before: Path | None, after: Path, count: int) -> list[dict[str, Any]]:
    """{question, reference, before, after} of `count` held-out questions, answered greedily by two Hugging Face folders, one in
    memory at a time. `before` None: there is no such folder to ask."""
    from nemo_ext import platform

    platform.activate()
    from transformers import AutoTokenizer

    from nemo_ext.evaluation.model import Model

    asked = questions(corpus, AutoTokenizer.from_pretrained(after), count)
    rows = [{"question": question.strip(), "reference": answer.strip(), "before": None} for _, question, answer in asked]
    folders = {"before": before, "after": after} if before else {"after": after}
    with bar("answering", len(folders) * len(asked), "questions") as progress:
        for number, (name, folder) in enumerate(folders.items()):
            model = Model(folder, name)
            base = number * len(asked)
            given = model.generate(
                [ids for ids, *_ in asked], max_new_tokens=MAX_NEW_TOKENS, progress=lambda done, base=base: progress(base + done)
            )
            model.close()
            for row, answer in zip(rows, given, strict=True):
                row[name] = answer.text.strip()
    return rows
