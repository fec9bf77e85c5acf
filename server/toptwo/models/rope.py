"""Reading the rotary embedding out of a config.json, as transformers 4 and 5 write it."""

from __future__ import annotations

import math

from toptwo.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    yarn_magnitude,
)
from toptwo.models.fields import ConfigFields


def read_rope(fields: ConfigFields, default_theta: float, dim: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`. dim: how many turn.

    Raises StartupError that names the key, for kinds of scaling that are not implemented.
    """
    parameters = _parameters(fields)
    theta = parameters.number("rope_theta", fields.number("rope_theta", default_theta))
    kind = "type" if parameters.has("type") and not parameters.has("rope_type") else "rope_type"
    parameters.require(kind, "default", "linear", "llama3", "yarn", "longrope", "su")
    for place in (fields, parameters):  # whoever turns a part of a head says which by `dim`
        place.require("partial_rotary_factor", None, 1.0)
    return RopeConfig(theta, _read_scaling(parameters.text(kind, "default"), parameters, fields, dim))


def read_sharpening(fields: ConfigFields) -> float:
    """DeepSeek's factor on attention scores in a stretched context, by `mscale_all_dim`; 1 without it."""
    parameters = _parameters(fields)
    if not parameters.has("mscale_all_dim"):
        return 1.0
    slope = parameters.number("mscale_all_dim")
    return yarn_magnitude(_factor(parameters, fields), slope) ** 2


def _parameters(fields: ConfigFields) -> ConfigFields:
    return fields.section("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")


def _read_scaling(kind: str, own: ConfigFields, fields: ConfigFields, dim: int) -> RopeScaling | None:
    if kind == "linear":
        return LinearScaling(own.number("factor"))
    if kind == "llama3":
        low, high = own.number("low_freq_factor"), own.number("high_freq_factor")
        if high <= low:
            raise own.error("high_freq_factor", f"must be over low_freq_factor ({low:g}), not {high:g}")
        return Llama3Scaling(own.number("factor"), low, high, _original_length(own, fields))
    if kind == "yarn":
        return _read_yarn(own, fields)
    if kind in ("longrope", "su"):
        return _read_longrope(own, fields, dim)
    return None


def _original_length(own: ConfigFields, fields: ConfigFields) -> int:
    key = "original_max_position_embeddings"
    place = fields if fields.has(key) else own  # where both say it, transformers believes the outer one
    return place.integer(key, fields.integer("max_position_embeddings"))


def _factor(own: ConfigFields, fields: ConfigFields) -> float:
    """How many times longer than the original the context is."""
    return own.number("factor", fields.integer("max_position_embeddings") / _original_length(own, fields))


def _read_yarn(own: ConfigFields, fields: ConfigFields) -> YarnScaling:
    factor = _factor(own, fields)
    magnitude = yarn_magnitude(factor)
    if own.has("mscale") and own.has("mscale_all_dim"):
        over_all = yarn_magnitude(factor, own.number("mscale_all_dim"))
        magnitude = yarn_magnitude(factor, own.number("mscale")) / over_all
    return YarnScaling(
        factor=factor,
        original_length=_original_length(own, fields),
        magnitude=own.number("attention_factor", magnitude),
        beta_fast=own.number("beta_fast", 32.0),
        beta_slow=own.number("beta_slow", 1.0),
        truncate=own.flag("truncate", True),
    )


def _read_longrope(own: ConfigFields, fields: ConfigFields, dim: int) -> LongRopeScaling:
    original, factor = _original_length(own, fields), _factor(own, fields)
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = own.number("attention_factor", magnitude)
    return LongRopeScaling(
        short_factors=own.numbers("short_factor", dim // 2),
        long_factors=own.numbers("long_factor", dim // 2),
        original_length=original,
        short_magnitude=own.number("short_mscale", magnitude),
        long_magnitude=own.number("long_mscale", magnitude),
    )
