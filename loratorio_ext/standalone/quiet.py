"""What libraries say on every run, kept off the terminal."""

import os
import warnings

LIBRARIES = ("diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "torch")


def silence_imports() -> None:
    """Before the libraries are imported: of what they say, errors only. What was set from outside stays."""
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", message="LoRAtorio: ")  # of which the command line tells by itself
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")


def silence_loading() -> None:
    """After it: no bars while a model is loaded, and of libraries that somebody had imported before, errors only."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        if os.environ[f"{library.__name__.upper()}_VERBOSITY"] == "error":
            library.utils.logging.set_verbosity_error()
