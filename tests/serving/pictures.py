"""Pictures for tests of the server, as clients send them."""

import base64
import io
import zlib

import numpy as np
from PIL import Image


def file_of(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def shade(value, size=(20, 12), mode="RGB"):
    """A picture of one colour."""
    return Image.new(mode, size, value if mode in ("L", "1") else (value, 0, 255 - value, 60)[: len(mode)])


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def part(url, kind="image_url"):
    return {"type": kind, kind: {"url": url}}


def about(*values, text="What is it?"):
    """Content of a message: pictures of these shades, and a question."""
    return [*(part(data_url(file_of(shade(value)))) for value in values), {"type": "text", "text": text}]


def clip(frames, size=(32, 32)):
    """An MP4 of so many frames, each brighter than the one before."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 255 * number // frames, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def bomb(width=30_000, height=30_000):
    """A PNG whose head tells of that many pixels, and that has none."""
    content = bytearray(file_of(shade(1, (1, 1))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)
