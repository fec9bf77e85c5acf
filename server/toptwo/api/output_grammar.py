"""The form that a request gives its answer, response_format or a guided_ field, as one grammar.

Knows the shape of requests; must not know tools or how a grammar is enforced.
"""

from __future__ import annotations

from toptwo.api.sampling_schema import SamplingFields
from toptwo.api.strict import contradiction
from toptwo.api.tool_schema import ResponseFormat
from toptwo.errors import ApiError
from toptwo.text.grammar import (
    GrammarError,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)


def check_one_grammar(fields: SamplingFields, response_format: ResponseFormat | None) -> list[str]:
    """The field that gives a form, if there is one.

    Raises PydanticCustomError when forms contradict one another, or an answer that never ends.
    """
    names = _forms(fields, response_format)
    if len(names) > 1:
        raise contradiction(names[1], f"It contradicts {names[0]}; give one of them.")
    if names and fields.ignore_eos:
        raise contradiction("ignore_eos", f"It contradicts {names[0]}, which says where the answer ends.")
    return names


def output_grammar(fields: SamplingFields, response_format: ResponseFormat | None) -> tuple[str | None, str]:
    """The serialised grammar of the answer, or None, and the field that it comes from.

    Raises ApiError (400) when a schema cannot be one.
    """
    param = next(iter(_forms(fields, response_format)), "response_format")
    if response_format is not None and response_format.json_schema is not None:
        param = "response_format.json_schema.schema"
    try:
        if fields.guided_regex is not None:
            return regex_grammar(fields.guided_regex), param
        if fields.guided_grammar is not None:
            return lark_grammar(fields.guided_grammar), param
        if response_format is None or response_format.type == "text":
            return None, param
        if response_format.json_schema is None:
            return json_object_grammar(), param
        return json_schema_grammar(response_format.json_schema.schema_ or {"type": "object"}), param
    except GrammarError as error:
        message = f"Invalid value for '{param}': {error}"
        raise ApiError(message, param=param, code="invalid_value") from None


def _forms(fields: SamplingFields, response_format: ResponseFormat | None) -> list[str]:
    given = {
        "response_format": response_format is not None and response_format.type != "text",
        "guided_regex": fields.guided_regex is not None,
        "guided_grammar": fields.guided_grammar is not None,
    }
    return [name for name, is_given in given.items() if is_given]
