"""Where the host reports what it swallows."""

import traceback

lines: list[str] = []


def report(message: str, *, exc_info: bool = False) -> None:
    """Print a message, and the exception being handled."""
    lines.append(f"*** {message}")
    if exc_info:
        lines.extend(traceback.format_exc().splitlines())


def display(error: Exception, task: str) -> None:
    lines.append(f"{task}: {type(error).__name__}: {error}")
    lines.extend(traceback.format_exception(error))
