"""Architectures: one file each, named as its Hugging Face model_type. See `registry.py`."""
