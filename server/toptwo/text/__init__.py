"""Words to token ids and back. Knows a model's text files; never HTTP, the engine or torch."""
