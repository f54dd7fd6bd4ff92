"""``<kind:argument:...>`` in prompts, and who answers to each kind."""

import re
from collections import defaultdict
from typing import Any

from modules import errors

TAG = re.compile(r"<(\w+):([^>]+)>")

extra_network_registry: dict[str, "ExtraNetwork"] = {}


class ExtraNetworkParams:
    """The arguments of one tag: ``positional``, and ``named`` ones (``te=0.5``)."""

    def __init__(self, items: list[str]):
        self.items = items
        self.positional = [item for item in items if item.count("=") != 1]
        self.named = dict(item.split("=") for item in items if item.count("=") == 1)

    def __eq__(self, other: Any) -> bool:
        return self.items == other.items


class ExtraNetwork:
    """One kind of tag."""

    def __init__(self, name: str):
        self.name = name

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        raise NotImplementedError

    def deactivate(self, p: Any) -> None:
        raise NotImplementedError


def parse_prompts(prompts: list[str]) -> tuple[list[str], dict[str, list[ExtraNetworkParams]]]:
    """The prompts without their tags, and the tags of the first."""
    tags = defaultdict(list)
    for kind, arguments in TAG.findall(prompts[0]):
        tags[kind].append(ExtraNetworkParams(arguments.split(":")))
    return [TAG.sub("", prompt) for prompt in prompts], tags


def activate(p: Any, data: dict[str, list[ExtraNetworkParams]]) -> None:
    """Tell every kind its tags, none or more."""
    for name, network in extra_network_registry.items():
        try:
            network.activate(p, data.get(name, []))
        except Exception as error:
            errors.display(error, f"activating extra network {name}")
    p.scripts.call(
        "after_extra_networks_activate",
        p,
        batch_number=p.iteration,
        prompts=p.prompts,
        seeds=p.seeds,
        subseeds=p.subseeds,
        extra_network_data=data,
    )


def deactivate(p: Any) -> None:
    for name, network in extra_network_registry.items():
        try:
            network.deactivate(p)
        except Exception as error:
            errors.display(error, f"deactivating extra network {name}")
