"""The one form of error message that all operators use."""

from __future__ import annotations

from typing import NoReturn


def fail(op: str, argument: str, expected: str, actual: object, error: type[Exception] = RuntimeError) -> NoReturn:
    """Raises an error that says what `argument` of `op` was expected to be; operators themselves raise RuntimeError."""
    raise error(f"{op}: expected `{argument}` to be {expected}, but got {actual}")
