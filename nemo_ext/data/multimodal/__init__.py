"""Conversations with images and sounds: their formats, decoding within limits, and batches for a model with senses.

Media stay where they are: prepared samples hold the token ids, and where to read each image or sound from.
"""
