"""The measuring instrument: loads any OpenAI-compatible server and tells how fast it answers."""
