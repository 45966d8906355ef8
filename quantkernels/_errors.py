"""The one form of error message that all operators use."""

from __future__ import annotations

from typing import NoReturn


def fail(op: str, argument: str, expected: str, actual: object) -> NoReturn:
    """Raises a RuntimeError that says what `argument` of `op` was expected to be."""
    raise RuntimeError(f"{op}: expected `{argument}` to be {expected}, but got {actual}")
