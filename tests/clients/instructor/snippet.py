import os

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Switch(BaseModel, extra="forbid"):
    on: bool


client = instructor.from_openai(
    OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
)
messages = [{"role": "user", "content": "Light, please."}]
print(client.create(model=os.environ["MODEL"], messages=messages, response_model=Switch))
