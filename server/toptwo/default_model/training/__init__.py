"""How the default model's experts were trained. A developer's tool: the server imports nothing from here."""
