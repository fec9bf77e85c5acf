"""Checkpoint formats: from files on disk to named tensors of floating-point numbers.

Knows files, their headers and how quantised weights are stored in them; must not know which names a model
wants, nor what becomes of the numbers. `protocol.py` says what the loader sees, `open.py` chooses.
"""
