"""The HTTP side: OpenAI's contract. Turns requests into token ids and token ids into answers."""
