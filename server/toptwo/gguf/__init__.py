"""GGUF files, llama.cpp's checkpoints: their headers, numbers and words, and the directory one stands for.

Public: `directory.write_model_directory`, `header.read_gguf`. Knows no torch and no architecture's code.
"""
