import os

import litellm

answer = litellm.completion(
    model="openai/" + os.environ["MODEL"],
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
    messages=[{"role": "user", "content": "Why is the sky blue?"}],
    max_tokens=64,
)
print(answer.choices[0].message.content)
