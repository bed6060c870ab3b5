"""Prepare a corpus in a process of its own, so that tests can kill it. Arguments: JSONL, tokenizer, cache, workers."""

import sys

from nemo_ext.data import corpus, readers
from nemo_ext.data.sources import parse

if __name__ == "__main__":
    data, tokenizer, cache, workers = sys.argv[1:]
    readers.BLOCK_BYTES = 20_000
    corpus.IN_PROCESS_BYTES = 0
    result = corpus.prepare(
        parse(data),
        tokenizer,
        cache,
        heldout=0.1,
        seq_length=16,
        workers=int(workers),
        progress=lambda done, total: print("progress", done, total, flush=True),
    )
    print(result.to_json())
