"""Runs one program that a model wrote, and the assertions about it, in a jail. Started by sandbox.py as a file, with no packages.

The first argument is the descriptor of the job in JSON; standard input and output are the program's own.
"""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jail  # noqa: E402

del sys.path[0]


def main() -> None:
    with os.fdopen(int(sys.argv[1]), encoding="utf-8") as file:
        job = json.load(file)
    try:
        jail.confine(job["means"], job["readable"], job["memory"], job["output"], job["seconds"])
    except OSError as error:
        os.write(job["result"], f"refused: {error.strerror}".encode())
        raise SystemExit(1) from None
    sys.path += job["packages"]
    sys.argv = ["answer.py"]
    run(job.pop("code"), job.pop("tests"), job.pop("result"), job.pop("token"))


def run(code: str, tests: list[str], result: int, token: str) -> None:
    """Execute `code`, then `tests` in its namespace; `token` is written to `result` only if none of it raised."""
    names = {"__name__": "answer" if tests else "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(code, "answer.py", "exec"), names)
    except SystemExit as end:
        if tests or end.code not in (None, 0):
            raise
    for test in tests:
        exec(compile(test, "test", "exec", optimize=0), names)
    sys.stdout.flush()
    os.write(result, token.encode())


if __name__ == "__main__":
    main()
