"""A pool's files as the host has read them, kept from one image to the next.

This is the one thing that outlives a generation: the host reads a file anew whenever it is not in the prompt, and a
pool's would be read for every image. What is kept is what the latest pool holds, so its limit bounds this, too.
"""

import os
from collections.abc import Callable
from typing import Any


class PoolFiles:
    """What was made of files, until they change or the next pool does without them."""

    def __init__(self):
        self._kept: dict[tuple, Any] = {}
        self._used: dict[tuple, Any] = {}

    def of(self, key: tuple, read: Callable[[], Any]) -> Any:
        """What ``read()`` makes of a file; ``key`` is its name, and what else it depends on."""
        key = (*key, os.stat(key[0]).st_mtime_ns)
        found = self._kept.get(key)
        self._used[key] = read() if found is None else found
        return self._used[key]

    def keep_used(self) -> None:
        """Forget all that was not asked for since the last time."""
        self._kept, self._used = self._used, {}


POOL_FILES = PoolFiles()
