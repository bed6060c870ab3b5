"""The reward `model`: a sequence classifier in Hugging Face's format, such as a reward model trained on preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError
from nemo_ext.rewards.parts import Failures, Row, need

BATCH = 16
LONGEST = 4096  # tokens, where the model names no limit


class Model:
    """Loaded when first used, in this process: bf16 on a GPU, fp32 on a CPU. With one label the value is its score, a number of
    any size; with two or more, the probability of the last label."""

    def __init__(self, folder: str | None, batch: int = BATCH) -> None:
        if not folder:
            raise UserError("reward=model needs reward_model=hf:FOLDER, a sequence classifier")
        self._folder = Path(folder.removeprefix("hf:")).expanduser()
        if not (self._folder / "config.json").is_file():
            raise UserError(f"reward_model={folder}: there is no config.json in {self._folder}")
        self._batch = batch
        self._loaded: tuple[Any, Any, int] | None = None

    def check(self, rows: Sequence[Row]) -> None:
        """Every row has a question, and the model can be loaded."""
        need("model", rows, "question")
        self._load()

    def score(self, answers: Sequence[str], rows: Sequence[Row], failures: Failures) -> list[float]:
        """The model's values, longest texts first so that batches are padded little. Texts are cut at the model's limit, from
        their start."""
        import torch

        tokenizer, model, longest = self._load()
        texts = [conversation(tokenizer, row, answer) for answer, row in zip(answers, rows, strict=True)]
        ids = [tokenizer(text, add_special_tokens=special)["input_ids"][-longest:] for text, special in texts]
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        values = [0.0] * len(ids)
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            width = len(ids[places[0]])
            pad = model.config.pad_token_id
            filled = torch.tensor([ids[place] + [pad] * (width - len(ids[place])) for place in places])
            mask = torch.tensor([[1] * len(ids[place]) + [0] * (width - len(ids[place])) for place in places])
            with torch.inference_mode():
                logits = model(input_ids=filled.to(model.device), attention_mask=mask.to(model.device)).logits.float()
            found = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, -1]
            for place, value in zip(places, found.tolist(), strict=True):
                values[place] = failures.value(value)
        return values

    def close(self) -> None:
        """Let the model go."""
        self._loaded = None

    def _load(self) -> tuple[Any, Any, int]:
        if self._loaded is None:
            from nemo_ext import platform

            platform.activate()
            import torch
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            gpu = torch.cuda.is_available()
            try:
                tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
                model, report = AutoModelForSequenceClassification.from_pretrained(
                    self._folder, local_files_only=True, dtype=torch.bfloat16 if gpu else torch.float32, output_loading_info=True
                )
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"reward_model={self._folder}: no sequence classifier: {reason}") from None
            if report["missing_keys"]:
                missing = ", ".join(sorted(report["missing_keys"])[:3])
                raise UserError(f"reward_model={self._folder}: no sequence classifier: its weights lack {missing}")
            if model.config.pad_token_id is None:
                model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            longest = getattr(model.config, "max_position_embeddings", None) or LONGEST
            self._loaded = tokenizer, model.eval().to("cuda" if gpu else "cpu"), min(longest, LONGEST)
        return self._loaded


def conversation(tokenizer: Any, row: Row, answer: str) -> tuple[str, bool]:
    """What the model reads, and whether the tokenizer adds its special tokens: the question and the answer in the tokenizer's
    chat template, or a line each where it has none."""
    messages = question(row)
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False), False
    return "\n".join([*(message["content"] for message in messages), answer]), True


def question(row: Row) -> list[dict[str, str]]:
    """A row's question as chat messages."""
    asked = row["question"]
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(message) for message in asked]
