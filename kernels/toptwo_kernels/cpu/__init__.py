"""The native CPU backend. It has no kernels yet; `instruction_sets` tells what they can use here."""

from __future__ import annotations


def instruction_sets() -> list[str]:
    """Instruction sets that the native backend was built for and this processor has; best last.

    Empty when the package was installed without its native extension.
    """
    try:
        from toptwo_kernels.cpu import _native
    except ImportError:
        return []
    return list(_native.instruction_sets())
