import os

from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    model=os.environ["MODEL"],
    base_url=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
    max_tokens=64,
)
print(model.invoke("Why is the sky blue?").content)
