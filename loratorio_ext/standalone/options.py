"""The command line's options for the rows of the one table of options."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from loratorio_ext.settings import OPTIONS, Lines, Option


def parameter(option: Option) -> inspect.Parameter:
    """An option of the table as one of the command; without being given it is None, so that presets can fill it in."""
    several = isinstance(option, Lines)
    allowed = "repeatable" if several else f"{option.allowed}; default {option.default}"
    help_text = f"{option.help} ({allowed})"
    panel = f"Composition: {option.group}" if option.group else "Composition"
    annotation = Annotated[
        (list[str] if several else option.given_as) | None, typer.Option(help=help_text, rich_help_panel=panel)
    ]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_table(command: Callable) -> Callable:
    """The command with an option for every row of the table, all of which come to it as ``**options``.

    ``enabled`` is a WebUI's: the command always composes.
    """
    own = list(inspect.signature(command).parameters.values())[:-1]
    table = [parameter(option) for option in OPTIONS if option.name != "enabled"]
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]

    @functools.wraps(command)
    def wrapper(**values):
        return command(**values)

    wrapper.__signature__ = inspect.Signature([*own, *table])
    wrapper.__annotations__ = {each.name: each.annotation for each in (*own, *table)}
    return wrapper
