"""Arrays out of pickles as JAX programs write them, without unpickling.

A pickle is a program for a small machine, and Python's own machine lets it import and call whatever it names.
This one knows the instructions that arrays are made of, works on plain data, and calls nothing: a global is a
name to it, and a name that no array needs is refused. Knows nothing of models.

Read are numpy arrays of float32, bfloat16 and int8, as pickle protocols 2 to 4 have them, and the
`QuantizedWeight8bit(weight, scales)` of xai-org's Grok-1.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path

import torch
from torch import Tensor

from toptwo.errors import CheckpointError


@dataclass(frozen=True)
class QuantizedWeight:
    """Whole numbers of 8 bits and their scales, one for each block of them."""

    weight: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Global:
    """What a pickle names of a Python module."""

    module: str
    name: str


@dataclass
class Made:
    """An object that a pickle makes: of what, with which arguments, and the state that it gets."""

    kind: Global
    arguments: object
    state: object = None


NDARRAY, DTYPE = Global("numpy", "ndarray"), Global("numpy", "dtype")
# numpy 2 moved it.
RECONSTRUCT = [Global(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
QUANTIZED = [Global(module, "QuantizedWeight8bit") for module in ("__main__", "model")]
BFLOAT16 = [Global(module, "bfloat16") for module in ("ml_dtypes", "jaxlib.xla_extension")]

CALLABLE = (DTYPE, *RECONSTRUCT)
KNOWN = (NDARRAY, *CALLABLE, *QUANTIZED, *BFLOAT16)
DTYPES: dict[object, torch.dtype] = {
    "f4": torch.float32,
    "i1": torch.int8,
    **dict.fromkeys(BFLOAT16, torch.bfloat16),
}


def read_array(path: Path) -> Tensor | QuantizedWeight:
    """The array of a file. Raises CheckpointError, which names the file, for anything else."""
    try:
        # Mapped, so that a length in it cannot ask for more memory than the file is long.
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as program:
            value = _Machine().run(program)
        if isinstance(value, Made) and value.kind in QUANTIZED:
            parts = value.state
            if not isinstance(parts, dict) or parts.keys() != {"weight", "scales"}:
                raise ValueError("a quantised weight is a weight and its scales")
            return QuantizedWeight(_to_tensor(parts["weight"]), _to_tensor(parts["scales"]))
        return _to_tensor(value)
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a pickled array: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _to_tensor(value: object) -> Tensor:
    match value:
        case Made(kind, _, (1, tuple(shape), Made(dtype, (code, *_), (_, order, *_)), fortran, bytes(data))):
            pass
        case _:
            raise ValueError("there is something else in it")
    if kind not in RECONSTRUCT or dtype != DTYPE or code not in DTYPES or order not in ("<", "|", "="):
        raise ValueError(f"numbers of type {order}{code} are not read")
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    number = DTYPES[code]
    if math.prod(shape) * number.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are not a {list(shape)} of {number}")
    # Copied, because torch wants memory that could be written to.
    tensor = torch.frombuffer(bytearray(data), dtype=number)
    return tensor.view(shape[::-1]).permute(*reversed(range(len(shape)))) if fortran else tensor.view(shape)


MARK = object()


@dataclass
class _Machine:
    """A stack, and a memory for what is used more than once. Instructions are those of module pickletools."""

    stack: list[object] = field(default_factory=list)
    memo: dict[int, object] = field(default_factory=dict)

    def run(self, program: mmap) -> object:
        """What is on the stack when the program ends."""
        for instruction, argument, _ in pickletools.genops(program):  # type: ignore[arg-type]  # reads as a file
            self._step(instruction.name, argument)
        return self.stack.pop()

    def _step(self, name: str, argument: object) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINBYTES" | "BINBYTES8" | "SHORT_BINBYTES":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._pop(int(name[-1])))
            case "TUPLE":
                stack.append(self._pop_to_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._set(self._pop(2))
            case "SETITEMS":
                self._set(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[_integer(argument)] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[_integer(argument)])
            case "GLOBAL":
                module, _, attribute = str(argument).partition(" ")
                stack.append(_known(module, attribute))
            case "STACK_GLOBAL":
                stack.append(_known(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                kind, arguments = self._pop(2)
                if not isinstance(kind, Global) or kind not in (CALLABLE if name == "REDUCE" else QUANTIZED):
                    raise ValueError(f"it makes something of {kind}")
                stack.append(Made(kind, arguments))
            case "BUILD":
                made, state = self._pop(2)
                if not isinstance(made, Made):
                    raise ValueError("it gives a state to what has none")
                made.state = state
                stack.append(made)
            case _:
                raise ValueError(f"no array needs the instruction {name}")

    def _pop(self, count: int) -> tuple[object, ...]:
        if len(self.stack) < count:
            raise ValueError("it takes more than there is")
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        return taken

    def _pop_to_mark(self) -> tuple[object, ...]:
        at = max(index for index, value in enumerate(self.stack) if value is MARK)
        taken = tuple(self.stack[at + 1 :])
        del self.stack[at:]
        return taken

    def _set(self, pairs: tuple[object, ...]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("it gives items to what has none")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))


def _known(module: object, name: object) -> Global:
    found = Global(str(module), str(name))
    if found not in KNOWN:
        raise ValueError(f"it names {module}.{name}, which no array needs; nothing of it was run")
    return found


def _integer(argument: object) -> int:
    if not isinstance(argument, int):
        raise ValueError("it remembers things by no number")
    return argument
