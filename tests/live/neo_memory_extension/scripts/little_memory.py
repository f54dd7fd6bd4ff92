"""Lets Forge Neo believe that of every model only so many bytes fit where it computes, so that it goes the way it goes
for ``--lowvram`` on a machine that has no accelerator: most weights lie elsewhere, and LoRAs act on them in passing.

How many says the environment variable LORATORIO_FITTING_BYTES; without it nothing is changed.
"""

import os

from backend.memory_management import LoadedModel


def let_fit(size):
    load = LoadedModel.model_load

    def load_in_parts(self, _lowvram_model_memory=0, force_patch_weights=False):
        # An amount of 0 would mean all of it.
        return load(self, max(0.1, size - self.model_loaded_memory()), force_patch_weights)

    LoadedModel.model_load = load_in_parts


if os.environ.get("LORATORIO_FITTING_BYTES"):
    let_fit(int(os.environ["LORATORIO_FITTING_BYTES"]))
