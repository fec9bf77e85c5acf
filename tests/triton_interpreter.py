"""What Triton's interpreter (3.6) does otherwise than a card, mended for tests.

It cuts numbers off where they should be rounded to bfloat16, carries nothing when it rounds to 8 bits,
multiplies bfloat16 matrices by their bits as integers, adds products up in an order that depends on how many
there are, warns of infinities, and takes a loop's length in a way that numpy 2.4 no longer knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
_convert = InterpreterBuilder.create_fp_to_fp
_patch_tensor = interpreter._patch_lang_tensor


def mend() -> None:
    np.seterr(all="ignore")
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _round, _multiply
    InterpreterBuilder.create_fp_to_fp = _round_to_byte
    interpreter._patch_lang_tensor = _patch_index


def _widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16, which the interpreter keeps as uint16, as float32; anything else as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _round(builder: InterpreterBuilder, given: TensorHandle, dtype: tl.dtype) -> TensorHandle:
    if dtype.scalar != tl.bfloat16:
        return _cast(builder, _widen(given), dtype)
    rounded = torch.from_numpy(np.array(given.data, dtype=np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _round_to_byte(
    builder: InterpreterBuilder, given: TensorHandle, dtype: tl.dtype, mode: Any
) -> TensorHandle:
    if dtype.scalar != tl.float8e4nv:
        return _convert(builder, given, dtype, mode)
    wide = torch.from_numpy(np.array(_widen(given).data, dtype=np.float32)).clamp(-448, 448)
    return TensorHandle(wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)


def _multiply(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *others: Any
) -> TensorHandle:
    a, b = _widen(a), _widen(b)
    if not np.issubdtype(a.data.dtype, np.floating):
        return _dot(builder, a, b, d, *others)
    # In float64 whatever order of addition is rounded to the same float32, as good as always.
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _patch_index(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
