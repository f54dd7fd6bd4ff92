"""Options, the state of the job under way, and the loaded model."""

from types import SimpleNamespace
from typing import Any

from modules.styles import StyleDatabase

DEFAULTS = {
    "CLIP_stop_at_last_layers": 1,
    "batch_cond_uncond": True,
    "enable_pnginfo": True,
    "hires_fix_use_firstpass_conds": False,
    "img2img_fix_steps": False,
    "lora_add_hashes_to_infotext": True,
    "lora_functional": False,
    "lora_in_memory_limit": 0,
    "overlay_inpaint": True,
    "pad_cond_uncond": False,
    "pad_cond_uncond_v0": False,
    "persistent_cond_cache": True,
    "s_min_uncond": 0.0,
    "s_min_uncond_all": False,
    "samples_save": True,
    "skip_early_cond": 0.0,
    "use_old_scheduling": False,
}


class OptionInfo:
    def __init__(self, default: Any = None, label: str = "", component: Any = None, component_args: Any = None, **_):
        self.default = default


class Options:
    """What the user has set, over the defaults."""

    def __init__(self):
        self.__dict__["data"] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name] if name in self.data else DEFAULTS[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.set(name, value)

    def add_option(self, name: str, info: "OptionInfo") -> None:
        DEFAULTS[name] = info.default

    def set(self, name: str, value: Any) -> None:
        if name not in DEFAULTS:
            raise KeyError(name)
        self.data[name] = value


class State:
    """The job under way."""

    def __init__(self):
        self.begin("")
        self.end()

    def begin(self, job: str) -> None:
        self.job = job
        self.job_count = -1
        self.skipped = self.interrupted = self.stopping_generation = False
        self.sampling_step = self.sampling_steps = 0
        self.current_latent = None

    def end(self) -> None:
        self.job = ""
        self.job_count = 0

    def interrupt(self) -> None:
        self.interrupted = True

    def skip(self) -> None:
        self.skipped = True


cmd_opts = SimpleNamespace(lora_dir="")
opts = Options()
prompt_styles = StyleDatabase()
state = State()
sd_model: Any = None
