"""FP8: weights of eight-bit floats, with a scale for blocks (DeepSeek) or for all of one (AutoFP8, vLLM).

    X  float8 [..., rows, columns]      X_scale_inv  float [..., rows / 128, columns / 128]
                                        or X_scale   float []

weight = X * scale, whatever the suffix says; X mostly ends in .weight. Blocks at the edges are smaller.
Facts: DeepSeek-V3's inference/kernel.py (weight_dequant); transformers 5.23, integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from toptwo.models.fields import ConfigFields
from toptwo.runtime.checkpoints.encoding import Encodings, named, stems
from toptwo.runtime.checkpoints.safetensors_files import SMALL_FLOATS, SafetensorsFiles
from toptwo.runtime.checkpoints.scaled import find_scaled

BLOCK = (128, 128)
# For activations and caches of eight bits, which are not computed in so few bits here.
UNUSED = ("input_scale", "activation_scale", "q_scale", "k_scale", "v_scale", "kv_scale")


def find(files: SafetensorsFiles, config: ConfigFields) -> Encodings:
    """See `encoding.FindEncodings`."""
    config.require("fmt", "e4m3", "e5m2")
    block = config.integers("weight_block_size") or BLOCK
    if len(block) != 2 or 0 in block:
        raise config.error("weight_block_size", f"must be two sizes, not {list(block)}")
    weights = {
        stem: find_scaled(files, (stem, f"{stem}{suffix}"), SMALL_FLOATS, (block[0], block[1]))
        for suffix in ("_scale_inv", "_scale")
        for stem in stems(files, suffix)
        if stem in files.names
    }
    return Encodings(weights, named(files, *UNUSED))
