"""Data: from sources that people name, over Megatron's indexed format, to NeMo 2's trainer. Guide: docs/data.md.

sources       what `data=` means
readers       documents out of files and data sets, in blocks that processes share
stdlib_docs   the built-in corpus `python-docs`
encoder       text to token ids: Hugging Face's ids, faster
indexed       Megatron's .bin/.idx
corpus        `prepare`: tokenise, split, cache
heldout       the fixed windows of the held-out documents
module        the data module for NeMo 2's trainer
"""
