"""Mixture of Experts = Router x Dispatcher x Experts. Start reading at `layer.py`."""
