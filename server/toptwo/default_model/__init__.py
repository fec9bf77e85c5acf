"""The default model: a Mixtral upcycled from a small dense model, prepared on the user's machine.

Public: `recipe.prepare_default_model` and `recipe.DEFAULT_MODEL_NAME`. Imports only `errors` and `gguf`.
"""
