"""Scripts of extensions. Their exceptions are reported, and the generation goes on."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from modules import errors, extensions

AlwaysVisible = object()

scripts_data: list[type["Script"]] = []


class Script:
    """What scripts inherit from. Methods that a script does not define are not called."""

    args_from = args_to = 0
    filename = None
    is_img2img = alwayson = False
    infotext_fields = None

    def title(self) -> str:
        raise NotImplementedError

    def show(self, is_img2img: bool) -> Any:
        return True

    def ui(self, is_img2img: bool) -> list:
        return []


def load_scripts(extension: Path) -> None:
    """Load an extension's scripts, with its folder on ``sys.path`` meanwhile."""
    extensions.extensions.append(extensions.Extension(extension.name, str(extension)))
    for path in sorted((extension / "scripts").glob("*.py")):
        before = sys.path
        sys.path = [str(extension), *sys.path]
        try:
            spec = importlib.util.spec_from_file_location(path.name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found = vars(module).values()
            scripts_data.extend(each for each in found if isinstance(each, type) and issubclass(each, Script))
        except Exception:
            errors.report(f"Error loading script: {path.name}", exc_info=True)
        finally:
            sys.path = before


class ScriptRunner:
    """The scripts of one tab, with their components' places among the tab's values."""

    def __init__(self, is_img2img: bool):
        self.scripts: list[Script] = []
        self.inputs: list[Any] = [None]
        self.infotext_fields: list[tuple] = []
        for kind in scripts_data:
            script = kind()
            script.is_img2img = is_img2img
            visibility = script.show(is_img2img)
            script.alwayson = visibility is AlwaysVisible
            if visibility:
                self.scripts.append(script)
                self.create_ui(script)
        self.defaults: list[Any] = [0] + [None] * (len(self.inputs) - 1)
        for script in self.scripts:  # the host's API builds a second set of components to read their values
            values = [component.value for component in script.ui(is_img2img) or []]
            self.defaults[script.args_from : script.args_to] = values

    def create_ui(self, script: Script) -> None:
        script.args_from = script.args_to = len(self.inputs)
        try:
            self.inputs += script.ui(script.is_img2img) or []
            self.infotext_fields += script.infotext_fields or []
        except Exception:
            errors.report(f"Error creating UI for {script.title()}", exc_info=True)
        script.args_to = len(self.inputs)

    def ordered_scripts(self, method: str) -> list[Script]:
        """Those that are always on and define a method."""
        return [script for script in self.scripts if script.alwayson and hasattr(script, method)]

    def before_process(self, p: Any) -> None:
        self.call("before_process", p)

    def process(self, p: Any) -> None:
        self.call("process", p)

    def postprocess(self, p: Any, processed: Any) -> None:
        self.call("postprocess", p, processed)

    def call(self, method: str, p: Any, *args: Any, **kwargs: Any) -> None:
        """Call a method of every script that has it, with the script's own values behind ``args``."""
        for script in self.ordered_scripts(method):
            values = p.script_args[script.args_from : script.args_to]
            try:
                getattr(script, method)(p, *args, *values, **kwargs)
            except Exception:
                errors.report(f"Error running {method}: {script.title()}", exc_info=True)
