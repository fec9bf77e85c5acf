"""Backends by name, and the native extension."""

from __future__ import annotations

import pytest

from toptwo_kernels import cpu, ops
from toptwo_kernels.registry import BACKENDS, load_backend


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_offers_every_op(name: str) -> None:
    wanted = [op for op in vars(ops.Ops) if not op.startswith("_")]
    assert len(wanted) > 5
    backend = load_backend(name)
    assert [op for op in wanted if not callable(getattr(backend, op, None))] == []


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="no kernel backend 'os'"):
        load_backend("os")


def test_the_native_extension_was_built_and_knows_this_processor() -> None:
    from toptwo_kernels.cpu import _native

    assert cpu.instruction_sets() == _native.instruction_sets()
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        flags = file.read()
    assert ("avx2" in cpu.instruction_sets()) == (" avx2 " in flags)
