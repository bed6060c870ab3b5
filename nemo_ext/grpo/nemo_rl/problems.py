"""Problems as NeMo-RL samples answers to them: a file of JSON lines, and the processor that makes a prompt of a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError
from nemo_ext.grpo.nemo_rl.emit import ENVIRONMENT

OURS = ("prompt", "ids", "task_name", "shown_tools")  # what a row has beside the data record


def write(path: str | Path, rows: Iterable[Mapping[str, Any]], tools: list[dict[str, Any]] | None = None) -> None:
    """Write problems (`nemo_ext.grpo.data`) for `read`: the data records and their prompts, without the token ids, and the
    schemas of the tools that the template shows with them."""
    shown = {"shown_tools": tools} if tools else {}
    lines = (json.dumps({n: value for n, value in row.items() if n != "ids"} | shown, ensure_ascii=False) for row in rows)
    write_atomic(path, "".join(f"{line}\n" for line in lines))


def read(path: str | Path) -> list[dict[str, Any]]:
    """The problems of a file, each with NeMo-RL's `task_name`. Raises UserError that names the line that is no problem."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                prompt = row["prompt"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}:{number} is not a JSON object with `prompt`, a list of chat messages") from None
            if not isinstance(prompt, list) or not prompt:
                raise UserError(f"{path}:{number}: prompt must be a list of chat messages")
            rows.append(row | {"task_name": ENVIRONMENT})
    return rows


def process(row: dict[str, Any], spec: Any, tokenizer: Any, max_seq_length: int | None, idx: int) -> dict[str, Any]:
    """One problem as NeMo-RL's DatumSpec (a `TaskDataProcessFnCallable`).

    The chat messages go through the tokenizer's template with the mark for an answer, and become one message whose `token_ids`
    (int64, [t]) the model continues. The environment gets the whole record as `extra_env_info`. A prompt longer than
    `max_seq_length` has loss_multiplier 0 and is cut; the launcher leaves such prompts out before.
    """
    tools = {"tools": row["shown_tools"]} if "shown_tools" in row else {}
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **tools)
    token_ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    fits = max_seq_length is None or len(token_ids) <= max_seq_length
    if not fits:
        token_ids = token_ids[:max_seq_length]
    return {
        "message_log": [{"role": "user", "content": text, "token_ids": token_ids}],
        "length": len(token_ids),
        "extra_env_info": {name: value for name, value in row.items() if name not in OURS},
        "loss_multiplier": 1.0 if fits else 0.0,
        "idx": idx,
        "task_name": row["task_name"],
    }
