"""Pickled arrays are read, and nothing else that a pickle says is done."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grok_release import Halves, QuantizedWeight8bit, pickled
from toptwo.errors import CheckpointError
from toptwo.model_commands.jax_pickles import QuantizedWeight, read_array

FLOATS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
WHOLE = np.arange(-12, 12, dtype=np.int8).reshape(2, 3, 4)


def read(tmp_path: Path, value: object, protocol: int = 4) -> Any:
    path = tmp_path / "tensor00000_000"
    path.write_bytes(pickled(value, protocol))
    return read_array(path)


@pytest.mark.parametrize("array", [FLOATS, WHOLE, FLOATS[0, 0], FLOATS.T, np.float32([7]), FLOATS[:, ::2]])
@pytest.mark.parametrize("protocol", [3, 4])
def test_a_numpy_array_is_read(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    got = read(tmp_path, array, protocol)
    assert torch.equal(got, torch.from_numpy(np.array(array)))
    got[(0,) * got.dim()] = 1  # in memory of its own


def test_bfloat16_and_quantised_weights_are_read(tmp_path: Path) -> None:
    scales = torch.randn(2, 1, 4).bfloat16()
    assert torch.equal(read(tmp_path, Halves(scales)), scales)
    got = read(tmp_path, QuantizedWeight8bit(WHOLE, Halves(scales)))
    assert isinstance(got, QuantizedWeight)
    assert torch.equal(got.weight, torch.from_numpy(WHOLE))
    assert torch.equal(got.scales, scales)


class Calls:
    """Pickled as a call, which unpickling makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(marker: Path) -> dict[str, tuple[object, str]]:
    """Objects whose unpickling creates the file `marker`, and the global that does it."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "a shell": (Calls(os.system, f"touch {marker}"), f"{os.system.__module__}.system"),
        "eval": (Calls(eval, code), "builtins.eval"),
        "exec": (Calls(exec, code), "builtins.exec"),
        "a process": (Calls(subprocess.check_call, ["touch", str(marker)]), "subprocess.check_call"),
        "numpy's own functions": (Calls(np.savetxt, str(marker), FLOATS[0]), "savetxt"),
        "within a quantised weight": (
            QuantizedWeight8bit(WHOLE, Calls(eval, code)),
            "builtins.eval",
        ),
        "behind an array": ((FLOATS, Calls(eval, code)), "builtins.eval"),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", payloads(Path()))
def test_a_pickle_that_runs_code_does_not(tmp_path: Path, name: str, protocol: int) -> None:
    marker, path = tmp_path / "ran", tmp_path / "tensor00000_000"
    value, culprit = payloads(marker)[name]
    path.write_bytes(pickled(value, protocol))
    with pytest.raises(CheckpointError) as caught:
        read_array(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    if protocol == 4:
        assert f"{culprit}, which no array needs" in str(caught.value)
    if name not in ("within a quantised weight",):  # whose class is not there to be loaded
        pickle.loads(path.read_bytes())
        assert marker.exists(), "what was refused would have run code"


def test_no_instruction_calls_or_imports(tmp_path: Path) -> None:
    """Programs that no pickler writes."""
    path = tmp_path / "tensor00000_000"
    programs = [
        b"cos\nsystem\n(S'true'\ntR.",  # the oldest protocol
        b"(cbuiltins\neval\nS'1'\no.",
        b"(S'1'\nibuiltins\neval\n.",
        b"\x80\x04\x82\x01.",  # an extension, by number
        b"\x80\x04\x8c\x02idQ.",  # a persistent id
        b"\x80\x04cnumpy\nndarray\n)\x81.",  # an array without numbers
        b"\x80\x04cnumpy\nndarray\n)R.",
        b"\x80\x04cnumpy\ndtype\n}b.",  # a state for the class itself
        b"\x80\x04c__main__\nQuantizedWeight8bit\n)R.",
        b"\x80\x04c__main__\nQuantizedWeight8bit\n)\x81}b.",
        b"\x80\x04K\x01\x85R.",
        b"\x80\x04}K\x01K\x02ss.",
        b"\x80\x04t.",
        b"\x80\x04h\x05.",
        b"\x80\x04b.",
        b"\x80\x04N.",
        b"\x80\x04.",
        b"\x80\x04",
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes without end
        b"no pickle",
        b"",
    ]
    for program in programs:
        path.write_bytes(program)
        with pytest.raises(CheckpointError, match="tensor00000_000: not a pickled array"):
            read_array(path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros(3, np.float64), "numbers of type <f8 are not read"),
        (np.zeros(3, ">f4"), "numbers of type >f4 are not read"),
        (np.array([None]), r"not a pickled array"),
        (np.zeros((0, 3), np.float32), r"\(0, 3\) is no shape"),
        ({"weight": FLOATS}, "there is something else in it"),
        (QuantizedWeight8bit(WHOLE, None), "there is something else in it"),
    ],
)
def test_other_things_are_refused(tmp_path: Path, value: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path, value)


def test_a_newer_protocol_is_refused_by_what_it_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="_frombuffer, which no array needs"):
        read(tmp_path, FLOATS, 5)


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    path, dice = tmp_path / "tensor00000_000", random.Random(0)
    sound = pickled(QuantizedWeight8bit(WHOLE, Halves(torch.ones(2, 1, 4).bfloat16())))
    refused = 0
    for _ in range(500):
        damaged = bytearray(sound[: dice.choice([len(sound), dice.randrange(len(sound))])])
        for _ in range(dice.randrange(1, 4)):
            if damaged:
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            read_array(path)
        except CheckpointError:
            refused += 1
    assert refused > 250


def test_serving_does_not_read_pickles() -> None:
    program = (
        "import sys, toptwo.cli, toptwo.launch, toptwo.launch_engine, toptwo.runtime.build, importlib\n"
        "from toptwo.models.registry import ARCHITECTURES\n"
        "for name in ARCHITECTURES: importlib.import_module(f'toptwo.models.{name}')\n"
        # A command's options are read at --help; what it does is imported when it is asked for.
        "print([name for name in sys.modules if 'model_commands.' in name and not name.endswith('_options')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
