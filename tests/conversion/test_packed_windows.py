"""Packed rows in models with sliding windows: a document's logits are those it has alone, beyond the window too."""

import numpy as np
import pytest
import tiny_models
import torch

from conversion import hf_to_nemo, nemo_folder
from conversion.compare.megatron import load_megatron, single_process
from nemo_ext.data.chat.module import RowBuilder

LENGTHS = (30, 25)  # tokens; the windows are 12


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_logits_of_packed_documents(name, tmp_path):
    hf_to_nemo.convert(tiny_models.save(name, tmp_path / "hf"), tmp_path / "nemo")
    generator = np.random.default_rng(0)
    documents = [(generator.integers(3, 250, n), np.full(n, 100, np.uint16)) for n in LENGTHS]
    row = RowBuilder(64, eod=2, unit=100, attention="mask").row(documents)
    with single_process():
        model = load_megatron(nemo_folder.find(tmp_path / "nemo"), 64)
        with torch.inference_mode():
            packed = model(row["tokens"][None], row["position_ids"][None], row["attention_mask"][None])[0]
            start = 0
            for ids, _ in documents:
                ids = torch.from_numpy(ids[:-1])[None]
                alone = model(ids, torch.arange(ids.shape[1])[None], None)[0]
                part = packed[start : start + len(alone)]
                assert alone.abs().max() > 0.5 and (part - alone).abs().max() < 1e-5
                start += len(alone)
