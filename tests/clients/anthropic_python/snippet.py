import os

from anthropic import Anthropic

client = Anthropic(base_url=os.environ["ANTHROPIC_BASE_URL"], api_key=os.environ["ANTHROPIC_API_KEY"])
message = client.messages.create(
    model=os.environ["MODEL"],
    max_tokens=64,
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
)
print(message.content[0].text)
