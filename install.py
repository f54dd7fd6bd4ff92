"""Run by the WebUI at start-up. Installs nothing: everything the extension needs comes with the host."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (the very thing to find out)
    print(f"LoRAtorio: Python 3.10 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
