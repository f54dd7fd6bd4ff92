"""Masks as they are given, kept and used: pictures that are white where a LoRA may act.

Given is a PNG or JPEG in base64, or a data URL with one. Kept is the grey picture alone, small enough for an infotext,
in one form whatever was given. Pillow is needed only here, and only once there is a mask.
"""

import base64
import binascii
import io
import re

LARGEST_SIDE = 128
"""Pixels. A latent of 1024 x 1024 pixels has as many; larger masks are made smaller, each pixel the mean of those it
stands for."""
MOST_PIXELS = 2**26
"""Of a picture that is given: what larger ones take to decode is more than a mask is worth."""

ALLOWED = "a PNG or JPEG in base64, or a data URL with one, white where the LoRA may act"
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


class MaskError(ValueError):
    """Why a text is no mask, in words for the user."""


def decoded(text: str):
    """The picture that a mask's text holds, grey and of its own size; raises `MaskError` for anything else.

    Transparent is black; an orientation that a camera noted is heeded.
    """
    from PIL import Image, ImageOps

    try:
        data = base64.b64decode("".join(DATA_URL.sub("", text, count=1).split()), validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise MaskError(f"a picture of {image.width} x {image.height} pixels is too large")
            image.load()
            image = ImageOps.exif_transpose(image)
    except binascii.Error as error:
        raise MaskError("it is no base64") from error
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:  # Pillow's, for what is broken
        raise MaskError("it is no such picture, or a broken one") from error
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut to 8 from the wrong end
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L")


def kept(text: str) -> str:
    """A mask in the form in which it is kept: a grey PNG of at most `LARGEST_SIDE` pixels a side, in base64.

    Raises `MaskError` for what is no picture, and for one without anything white.
    """
    from PIL import Image

    image = decoded(text)
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BOX, reducing_gap=None)
    if image.getextrema()[1] == 0:
        raise MaskError("it is black everywhere")
    plain = Image.new("L", image.size)  # without the profile, comments and resolution that the file came with
    plain.paste(image)
    file = io.BytesIO()
    plain.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
