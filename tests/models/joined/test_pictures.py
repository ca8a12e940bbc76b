"""Pictures and videos as they are given to a processor without torchvision."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import is_torchvision_available

from transformers_dsv3.models.joined import pictures
from transformers_dsv3.models.joined.layout_internvl import TOKENS
from transformers_dsv3.models.joined.processing_internvl import InternVLProcessor


@pytest.fixture(scope="module")
def processor(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=TOKENS)
    parts = {"image_processor": GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}), "tokenizer": tokenizer}
    if is_torchvision_available():
        from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

        parts["video_processor"] = InternVLVideoProcessor(size={"height": 16, "width": 16})
    return InternVLProcessor(**parts, image_seq_length=4)


def shade(value, size=(20, 12)):
    return Image.new("RGB", size, (value, 0, 0))


def test_frames_of_several_videos_stand_between_pictures(processor):
    clips = [[shade(10), shade(20)], np.stack([np.asarray(shade(value)) for value in (30, 40, 50)])]
    text = "a <video> b <IMG_CONTEXT> c <video>"
    given = processor(images=shade(200), text=text, videos=clips, return_tensors="pt")
    words = processor.tokenizer.decode(given["input_ids"][0])
    tile = "<img>" + 4 * "<IMG_CONTEXT>" + "</img>"
    expected = f"a Frame1: {tile}\nFrame2: {tile} b {tile} c Frame1: {tile}\nFrame2: {tile}\nFrame3: {tile}"
    assert words == expected
    ordered = [10, 20, 200, 30, 40, 50]
    alone = processor.image_processor([shade(value) for value in ordered], crop_to_patches=False)["pixel_values"]
    torch.testing.assert_close(given["pixel_values"], torch.tensor(np.stack(alone)))


def test_a_picture_is_turned_upright(processor):
    image = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = processor(images=Image.open(file), text="<IMG_CONTEXT>", crop_to_patches=False, return_tensors="pt")
    plain = processor(images=image.rotate(180), text="<IMG_CONTEXT>", crop_to_patches=False, return_tensors="pt")
    torch.testing.assert_close(turned["pixel_values"], plain["pixel_values"])


def bad_pictures(folder):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(whole.getvalue()[:900])
    shade(1).save(folder / "moving.gif", save_all=True, append_images=[shade(90), shade(180)])
    Image.new("1", (30_000, 30_000)).save(folder / "large.png")
    return {
        "empty.png": "no picture that can be opened",
        "truncated.png": "cannot be decoded",
        "moving.gif": "in 3 frames",
        "large.png": "30000 x 30000 pixels|DecompressionBomb|exceeds limit",
        "absent.png": "no such file",
    }


def test_bad_pictures_are_named(processor, tmp_path):
    for name, reason in bad_pictures(tmp_path).items():
        with pytest.raises(ValueError, match=rf"picture 2 .*{name}.*({reason})"):
            processor(images=[shade(3), tmp_path / name], text="<IMG_CONTEXT> <IMG_CONTEXT>")
    for mode, size in (("CMYK", (9, 9)), ("L", (1, 1)), ("RGBA", (1, 40))):
        given = processor(images=Image.new(mode, size), text="<IMG_CONTEXT>", crop_to_patches=False)
        assert np.isfinite(given["pixel_values"]).all()


def test_places_and_pictures_have_to_be_as_many(processor):
    with pytest.raises(ValueError, match="2 places for pictures .* and 1 are given"):
        processor(images=shade(1), text=["<IMG_CONTEXT>", "<IMG_CONTEXT>"])
    with pytest.raises(ValueError, match="0 places for videos .* and 1 are given"):
        processor(text="words", videos=[[shade(1)]])
    with pytest.raises(ValueError, match="video 1: it has no frames"):
        processor(text="<video>", videos=[[]])


def test_a_file_is_sampled_by_time(processor, tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 6 * number, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    frames, seconds = pictures.frames_of(tmp_path / "clip.mp4", "video 1", num_frames=4)
    assert seconds == [0.5, 1.5, 2.5, 3.5]
    means = [np.asarray(frame).mean() for frame in frames]
    assert np.abs(np.array(means) - [30, 90, 150, 210]).max() < 8
    given = processor(text="<video>", videos=[tmp_path / "clip.mp4"], fps=1, timestamps=True, return_tensors="pt")
    assert len(given["pixel_values"]) == 4
    assert "Frame2 at 1.5 s: <img>" in processor.tokenizer.decode(given["input_ids"][0])
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"video 1 \(.*bad.mp4\): no video that can be read"):
        processor(text="<video>", videos=[tmp_path / "bad.mp4"])
