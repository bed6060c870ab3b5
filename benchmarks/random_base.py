"""`launchers/run.py` for an adapter of a base that is drawn at random: its speed and memory need no published weights.

python benchmarks/random_base.py recipe=lora_llama3 size=8b tokenizer=FOLDER data=chat.jsonl steps=10 keep=0 out=RUN
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import recipes  # noqa: E402
from launchers import inputs, prepare, run  # noqa: E402


def main(arguments: list[str]) -> int:
    def starting_point(recipe: str, method, family: str, keys: dict, planning: bool):
        return None, recipes.architecture(recipe, keys)

    with mock.patch.object(inputs, "starting_point", starting_point), mock.patch.object(prepare, "describe"):
        return run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
