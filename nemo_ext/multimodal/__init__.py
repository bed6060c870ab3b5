"""Eyes and ears for a decoder: an encoder of images or sounds, and a projector to the decoder's embeddings.

`description.py` is plain data and imports neither torch nor NeMo.
"""
