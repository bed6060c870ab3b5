"""The embedded engine: continuous batching over a transformers model, on a CPU or a GPU.

`request.py` is the language spoken with it (no torch), `engine.py` the loop, `scheduler.py` who runs in which row, `cache.py` the
keys and values, `network.py` the model, `prompts.py` the way in, `sampling.py`, `beams.py`, `words.py` and `grammar.py` the
choice of tokens, `speculation.py` guesses of them, `text.py` what they spell. Nothing here knows HTTP.
"""
