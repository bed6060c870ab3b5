"""What an answer is worth. One signature for all: reward(answers, rows) -> list of floats; guide: docs/rewards.md.

registry    names, settings, `build` a reward or a weighted sum of them, what failed in it
text        exact, numeric, choice, format, length: rules of a few lines
maths       math: equality by math-verify (equality.py), in worker processes
code        code: a program against its row's tests, in the sandbox (sandbox.py, jail.py, program.py)
reasoning_gym  reasoning_gym:TASK: the task's own verifier; and problems of a task
model       model: a sequence classifier in Hugging Face's format
judge       judge: a language model behind an OpenAI-compatible endpoint
user        FILE.py:FUNCTION: a function of the user's
pool        worker processes (worker.py) that are killed when they hang
nemo_rl_environment  the same rewards as a NeMo-RL environment

Rows are data records: `question`, `answer`, and whatever else the data has.
"""

from nemo_ext.rewards.registry import Reward, Scores, Settings, build, names

__all__ = ["Reward", "Scores", "Settings", "build", "names"]
