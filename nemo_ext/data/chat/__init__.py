"""Conversations for supervised fine-tuning: from the formats people have to rows for NeMo 2's trainer. Guide: docs/data.md.

records    records out of files and data sets, each with its place
formats    records as one conversation: messages, ShareGPT, Alpaca, prompt and completion
templates  chat templates for tokenizers without one, by name
render     conversations as token ids and loss weights, by the chat template
store      `prepare`: render, tokenise, split, cache
pack       several conversations in a row
module     the data module for NeMo 2's trainer
preview    one conversation with the trained text in colour
"""
