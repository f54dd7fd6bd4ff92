"""Run by the WebUI at start-up. Installs nothing: everything the extension needs comes with the host."""

import re

OLDEST = (1, 10)


def host_version() -> tuple[int, int] | None:
    """The version of the WebUI's code that this one is, or is built on; None where it does not tell."""
    try:
        from modules.launch_utils import git_tag

        found = re.findall(r"(\d+)\.(\d+)\.\d+", git_tag())
    except Exception:  # a warning is not worth a failed start
        return None
    return tuple(map(int, found[-1])) if found else None


if __name__ == "__main__":
    version = host_version()
    if version is not None and version < OLDEST:
        print(f"LoRAtorio: made for WebUI 1.10 or newer, this is {version[0]}.{version[1]}: it may not work here")
