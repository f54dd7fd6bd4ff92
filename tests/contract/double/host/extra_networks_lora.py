"""``<lora:name:te:unet:dyn>`` in prompts."""

from typing import Any

import networks
from modules import extra_networks, shared


class ExtraNetworkLora(extra_networks.ExtraNetwork):
    def __init__(self):
        super().__init__("lora")

    def activate(self, p: Any, params_list: list[extra_networks.ExtraNetworkParams]) -> None:
        networks.failures.clear()
        names, te, unet, dyn = [], [], [], []
        for params in params_list:
            values = dict(zip(("name", "te", "unet", "dyn"), params.positional)) | params.named
            names.append(values["name"])
            te.append(float(values.get("te", 1.0)))
            unet.append(float(values.get("unet", te[-1])))
            dyn.append(int(values["dyn"]) if "dyn" in values else None)
        networks.load_networks(names, te, unet, dyn)
        if shared.opts.lora_add_hashes_to_infotext:
            if not p.is_hr_pass or not hasattr(p, "lora_hashes"):
                p.lora_hashes = {}
            p.lora_hashes |= {each.mentioned_name: each.network_on_disk.shorthash for each in networks.loaded_networks}
            if p.lora_hashes:
                hashes = ", ".join(f"{name}: {value}" for name, value in p.lora_hashes.items())
                p.extra_generation_params["Lora hashes"] = hashes

    def deactivate(self, p: Any) -> None:
        if networks.failures:
            failures = ", ".join(f"{name} ({count})" for name, count in networks.failures.items())
            p.comment(f"Networks with errors: {failures}")
            networks.failures.clear()
