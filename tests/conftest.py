"""What tests of several rooms share: a small tokenizer, a small corpus, and keys of a model that trains in milliseconds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

# Files of few tests that take minutes: processes that share the files among them begin with these, so that none is left over.
SLOWEST = (
    "test_slurm_real.py", "test_run_faults.py", "test_run.py", "test_layouts.py", "test_neva.py", "test_adapters.py",
    "test_dora.py", "test_run_chat.py", "test_run_adapter.py", "test_adalora_fourierft.py", "test_k8s_pods.py",
    "test_run_grpo.py", "test_qlora.py", "test_run_senses.py", "test_evaluate_adapters.py", "test_mixture_of_experts.py",
    "test_faults.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first; the others keep their order."""
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """`tokenizer` and `data` (paths), `cache` (a folder for LLM_BUILDER_CACHE) and `keys` of a run on them."""
    from tokenizers import ByteLevelBPETokenizer

    from nemo_ext.data import stdlib_docs

    folder = tmp_path_factory.mktemp("small")
    texts = [text if isinstance(text, str) else text[1] for _, text in zip(range(40), stdlib_docs.documents(), strict=False)]
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save(str(tokenizer / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    keys = (
        "recipe=pretrain_custom layers=2 hidden=64 heads=4 kv_heads=2 ffn=128 vocab=512 seq=64 global_batch=4 lr=1e-3 "
        f"heldout=0.1 val_batches=2 tensorboard=false tokenizer={tokenizer} data={data}"
    )
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, data=data, cache=folder / "cache", keys=keys.split(), texts=texts)
