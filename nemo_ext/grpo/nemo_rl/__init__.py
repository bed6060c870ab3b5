"""GRPO at scale, through NeMo-RL: its configuration, checked and written, and what runs inside its container.

    tree     which keys a version has, of which types: `check`, `set_paths`
    emit     a complete configuration from the keys of a GRPO recipe
    limits   what a version cannot do as the keys mean it
    train    the process inside the container (`python -m nemo_ext.grpo.nemo_rl.train`)
    problems what it samples answers to
    reader   how the trees in `versions/` were read from NeMo-RL's source

Nothing here but `train` needs NeMo-RL. It has not run yet where these files were written: see docs/grpo.md.
"""
