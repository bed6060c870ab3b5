"""Held-out questions answered by a model before and after it was tuned, for people to read side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.multimodal.description import AUDIO, VISION, Sense
from nemo_ext.progress import bar

MAX_NEW_TOKENS = 96
BATCH = 32  # answers at once of a model that sees
IMAGES = "answers"  # the run's folder of images that answers are about
MEDIA = {VISION: "pixel_values", AUDIO: "input_features"}  # what transformers calls an encoder's inputs


def questions(corpus, tokenizer, count: int) -> list[tuple[list[int], str, str]]:
    """The first `count` held-out samples of a `ChatCorpus`, spread over its sources: (ids of the prompt, its text, the answer).

    The prompt is what stands before the first learnt token, the answer that token and those learnt after it.
    """
    from nemo_ext.data.chat.store import Samples

    found = []
    for side, number in _places(corpus, Samples, count):
        ids, weights = side[number]
        start, end = _first_answer(weights)
        answer = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        found.append((ids[:start].tolist(), _last_turn(ids[:start], tokenizer), answer))
    return found


def _places(corpus, samples: type, count: int) -> list[tuple[Any, int]]:
    """(samples, number) of the first `count` held-out samples, spread over a corpus' sources."""
    sides = [samples(source.heldout_prefix) for source in corpus.sources if source.heldout_prefix]
    return [(side, number) for number in range(count) for side in sides if number < len(side)][:count]


def _first_answer(weights) -> tuple[int, int]:
    """Where the first learnt tokens begin and end."""
    learnt = weights > 0
    start = int(learnt.argmax())
    return start, start + int((~learnt[start:]).argmax()) if not learnt[start:].all() else len(weights)


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


def with_media(
    corpus, senses: list[dict[str, Any]], before: Path | None, run_dir: Path, count: int, scored: int
) -> dict[str, Any]:
    """`answers` as `side_by_side` has them, of held-out conversations with images, each with its first image in `run_dir`.

    With `scored`, so many are answered and compared with their references word for word: `exact` is {"before": (share, low,
    high), "after": ..., "commonest": share, "count": n}, with Wilson's intervals of 95%; the commonest reference as the answer to
    all would be right that often. Empty where transformers has no class for the model.
    """
    from nemo_ext import platform, run_folder

    platform.activate()
    from transformers import AutoConfig, AutoTokenizer

    after, sense = run_dir / run_folder.EXPORT, senses[0]["sense"]
    try:
        AutoConfig.from_pretrained(after)
    except ValueError as error:
        print(f"no answers: transformers does not load {after}: {str(error).splitlines()[0]}")
        return {}
    asked = _with_images(corpus, senses, AutoTokenizer.from_pretrained(after), max(count, scored))
    folders = {"before": before, "after": after} if before else {"after": after}
    modality = Sense.from_dict(sense).modality
    rows = [{"question": each.question, "reference": each.answer, "before": None} for each in asked]
    with bar("answering", len(folders) * len(asked), "questions") as progress:
        for number, (name, folder) in enumerate(folders.items()):
            base = number * len(asked)
            tiled = sense["tiling"] is not None
            given = _generate(folder, asked, MEDIA[modality], tiled, lambda done, base=base: progress(base + done))
            for row, answer in zip(rows, given, strict=True):
                row[name] = answer
    found: dict[str, Any] = {"answers": rows[:count]}
    for number, (row, each) in enumerate(zip(rows[:count], asked, strict=False)):
        if modality == VISION and each.picture is not None:
            row["image"] = f"{IMAGES}/{number}{each.suffix}"
            (run_dir / IMAGES).mkdir(exist_ok=True)
            (run_dir / row["image"]).write_bytes(each.picture)
    if scored and rows:
        found["exact"] = _exact(rows, folders)
    return found


@dataclass(frozen=True)
class _Asked:
    """A held-out conversation up to its first learnt token: `inputs` float32 [n, ...] for the encoder, of each image or sound."""

    ids: list[int]
    inputs: list[Any]
    shapes: list[tuple[int, ...]]
    question: str
    answer: str
    picture: bytes | None
    suffix: str


def _with_images(corpus, senses: list[dict[str, Any]], tokenizer, count: int) -> list[_Asked]:
    """The first held-out samples, spread over a corpus' sources."""

    from nemo_ext.data.multimodal.inputs import from_dict
    from nemo_ext.data.multimodal.store import Samples

    source = from_dict(senses[0])
    found = []
    for side, number in _places(corpus, Samples, count):
        ids, weights, media = side[number]
        start, end = _first_answer(weights)
        media = media[: _inputs_before(ids[:start], media, source)]
        data = [each.location.read() for each in media]
        arrays = [source.inputs(raw, each.shape) for raw, each in zip(data, media, strict=True)]
        words = ids[:start][ids[:start] != source.sense.token_id]
        found.append(
            _Asked(
                ids[:start].tolist(),
                arrays,
                [each.shape for each in media],
                _last_turn(words, tokenizer).strip(),
                tokenizer.decode(ids[start:end], skip_special_tokens=True).strip(),
                data[0] if data else None,
                _suffix(data[0]) if data else "",
            )
        )
    return found


def _inputs_before(ids, media, source) -> int:
    """How many of the media stand in these ids."""
    left, count = int((ids == source.sense.token_id).sum()), 0
    for each in media:
        left -= len(source.gather(each.shape))
        if left < 0:
            break
        count += 1
    return count


def _keywords(asked: list[_Asked], key: str, tiled: bool) -> dict[str, Any]:
    """The media of these as transformers' models take them: all inputs as `key`; of images in tiles each image's, filled up to
    one number of tiles, with the images' sizes."""
    import torch

    arrays = [torch.from_numpy(array) for each in asked for array in each.inputs]
    if not arrays:
        return {}
    if not tiled:
        return {key: torch.cat(arrays)}
    sizes = torch.tensor([shape for each in asked for shape in each.shapes])
    return {key: torch.nn.utils.rnn.pad_sequence(arrays, batch_first=True), "image_sizes": sizes}


def _generate(folder: Path, asked: list[_Asked], key: str, tiled: bool, progress) -> list[str]:
    """Greedy answers of a Hugging Face model that takes media as `key`, those with prompts of one length together."""
    import torch
    import transformers

    from nemo_ext.platform import hardware

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = "auto" if hardware.has_cuda() else torch.float32
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    network = getattr(transformers, name).from_pretrained(folder, dtype=kind).eval().cuda()
    answers: list[str] = [""] * len(asked)
    longest = max(len(tokenizer(each.answer)["input_ids"]) for each in asked)
    alike: dict[tuple[int, int], list[int]] = {}
    for number, each in enumerate(asked):
        alike.setdefault((len(each.ids), len(each.inputs)), []).append(number)
    done = 0
    for numbers in alike.values():
        for batch in (numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)):
            ids = torch.tensor([asked[number].ids for number in batch]).cuda()
            media = _keywords([asked[number] for number in batch], key, tiled)
            media = {name: value.to(network.dtype if name == key else value.dtype).cuda() for name, value in media.items()}
            with torch.inference_mode():
                given = network.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **media, do_sample=False,
                    max_new_tokens=min(MAX_NEW_TOKENS, 2 * longest + 8), pad_token_id=tokenizer.pad_token_id or 0,
                )  # fmt: skip
            for number, row in zip(batch, given[:, ids.shape[1] :], strict=True):
                answers[number] = tokenizer.decode(row, skip_special_tokens=True).strip()
            done += len(batch)
            progress(done)
    return answers


def _exact(rows: list[dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """`exact` of `with_media`."""
    from nemo_ext.evaluation.text_metrics import exact

    references = [row["reference"] for row in rows]
    found: dict[str, Any] = {}
    for name in names:
        metric, _ = exact([row[name] for row in rows], [[reference] for reference in references])
        found[name] = (metric.value, metric.low, metric.high)
    return {**found, "commonest": Counter(references).most_common(1)[0][1] / len(rows), "count": len(rows)}


def _suffix(data: bytes) -> str:
    """Of an image file, by its first bytes."""
    return ".jpg" if data[:2] == b"\xff\xd8" else ".webp" if data[8:12] == b"WEBP" else ".gif" if data[:3] == b"GIF" else ".png"
