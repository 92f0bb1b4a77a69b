"""Whether what is wrong is refused, and by an error that its caller can tell from a defect."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["refused"]


def refused(call: Callable[[], object], what: str, *errors: type[Exception]) -> None:
    """Raise AssertionError unless the call raises one of these errors, ValueError where none is named."""
    expected = errors or (ValueError,)
    try:
        call()
    except expected:
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__} ({error}), not {_named(expected)}") from error
    raise AssertionError(f"{what} was not refused with {_named(expected)}")


def _named(errors: tuple[type[Exception], ...]) -> str:
    return " or ".join(error.__name__ for error in errors)
