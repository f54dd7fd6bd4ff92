"""Files of images, and the font for words on them."""

import os
from typing import Any

from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo


def get_font(fontsize: int) -> Any:
    return ImageFont.load_default(fontsize)


def save_image(
    image: Image.Image,
    path: str,
    basename: str,
    seed: int | None = None,
    prompt: str | None = None,
    extension: str = "png",
    info: str | None = None,
    p: Any = None,
    forced_filename: str | None = None,
    suffix: str = "",
    save_to_dirs: bool | None = None,
) -> tuple[str, None]:
    """Save an image under the next number of its folder and its seed, or under a name that is forced on it."""
    os.makedirs(path, exist_ok=True)
    name = f"{len(os.listdir(path)):05}-{seed}{suffix}" if forced_filename is None else forced_filename
    text = PngInfo()
    text.add_text("parameters", info or "")
    image.already_saved_as = os.path.join(path, f"{name}.{extension}")
    image.save(image.already_saved_as, pnginfo=text)
    return image.already_saved_as, None
