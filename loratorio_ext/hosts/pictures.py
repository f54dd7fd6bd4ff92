"""Pictures of who painted what, as the host shows and saves its own: behind the images, and beside their files."""

import os
from collections.abc import Sequence
from typing import Any

from modules import images, shared

from loratorio_ext.generation import Generation
from loratorio_ext.heatmaps import pictures


def region_painted(p: Any) -> tuple[int, int, int, int] | None:
    """The part of the image that was sampled, as left, top, width, height; None: all of it."""
    return getattr(p, "paste_to", None)


def save_beside(image: Any, picture: Any, kind: str, infotext: str, p: Any) -> None:
    """Save a picture under the name of the image's own file, where the host has saved that."""
    file = getattr(image, "already_saved_as", None)
    if file is None:
        return
    stem, ending = os.path.splitext(os.path.basename(file))
    name, folder = f"{stem}-loratorio-{kind}", os.path.dirname(file)
    images.save_image(
        picture, folder, "", extension=ending[1:], info=infotext, p=p, forced_filename=name, save_to_dirs=False
    )


def keep_in_step(processed: Any, image_of_picture: Sequence[int]) -> None:
    """Give every picture its own image's seeds and prompts: who takes the answer apart looks these up by place, and
    drops what has none (a WebUI that shares its work out over others does)."""
    for name in ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds"):
        known = list(getattr(processed, name, None) or ())
        if known:
            more = [known[min(image, len(known) - 1)] for image in image_of_picture]
            missing = len(processed.images) - len(known) - len(more)  # a grid stands before the images
            setattr(processed, name, [*known, *more, *more[-1:] * missing])


def show(generation: Generation, processed: Any) -> None:
    """Put the pictures behind the result's images, each with its own image's infotext, and save them with these."""
    p, settings = generation.p, generation.settings
    if not settings.show_maps:
        return
    first, texts = getattr(processed, "index_of_first_image", 0), list(processed.infotexts)
    # A host that returns masks, too, has no text for these.
    processed.infotexts += texts[-1:] * (len(processed.images) - len(texts))
    number, image_of_picture = first, []
    for batch, record in enumerate(generation.records):
        for index in range(record.images):
            image = generation.images.get((batch, index))
            text = texts[min(number, len(texts) - 1)]
            smooth, region = settings.upsampling == "bilinear", region_painted(p)
            # There is no image where the generation was interrupted before.
            painted = image and pictures(record, index, image, smooth, region, images.get_font)
            for kind, picture in (painted or {}).items():
                if shared.opts.enable_pnginfo:
                    picture.info["parameters"] = text
                save_beside(image, picture, kind, text, p)
                processed.images.append(picture)
                processed.infotexts.append(text)
                image_of_picture.append(number - first)
            number += 1
    keep_in_step(processed, image_of_picture)
