"""Measures models: how well they predict a text, choose an answer, write one, and what a judge thinks of that.

`tasks.py` says what there is to measure, a module each does it: `perplexity.py`, `multiple_choice.py` (with `questions.py`),
`generation.py` (with `text_metrics.py`), `judging.py` (with `judge.py`) and `harness.py`. They use `model.py`, a Hugging Face
folder on one device, and give a `results.Result`; `results.py` keeps those of finished tasks and `report.py` shows them.
"""
