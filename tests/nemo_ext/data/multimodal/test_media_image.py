import io
import struct
import zlib

import numpy as np
import pytest
from media_samples import encoded, picture, token_id, vision
from PIL import Image, ImageFile

from nemo_ext import platform
from nemo_ext.data.multimodal import image as images
from nemo_ext.data.multimodal import tiling
from nemo_ext.data.multimodal.image import ImageSettings, decode
from nemo_ext.data.multimodal.inputs import ImageInput
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Encoder, Projector, Sense, Tiling


@pytest.fixture(scope="module", autouse=True)
def transformers():
    platform.activate()


SIZES = [(40, 30), (30, 40), (64, 64), (28, 28), (300, 17), (9, 100), (31, 29)]
PROCESSORS = {
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
    "clip, old sizes": ("CLIPImageProcessor", {"size": 33, "crop_size": 28}),
    "clip, padded": ("CLIPImageProcessor", {"do_resize": False, "crop_size": {"height": 28, "width": 28}}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 28, "width": 28}}),
    "siglip, bilinear": (
        "SiglipImageProcessor",
        {"size": {"height": 28, "width": 28}, "resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]},
    ),
    "unnormalised": ("CLIPImageProcessor", {"size": 28, "crop_size": 28, "do_normalize": False, "do_rescale": False}),
    "llava": ("LlavaImageProcessor", {"do_pad": True, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_transformers_bit_by_bit(tmp_path, name):
    import transformers

    kind, values = PROCESSORS[name]
    processor = getattr(transformers, kind)(**values)
    processor.save_pretrained(tmp_path)
    settings = ImageSettings.from_folder(tmp_path)
    for k, (width, height) in enumerate(SIZES):
        image = picture(k, width, height)
        expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], np.float32)
        pixels = settings.pixels(image)
        assert pixels.dtype == np.float32 and pixels.shape == (3, 28, 28)
        assert np.array_equal(pixels, expected), (width, height)


def test_settings_of_published_encoders(tmp_path):
    import transformers

    image = picture(3, 50, 41)
    for kind, processor in (
        ("clip_vision_model", transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})),
        ("siglip_vision_model", transformers.SiglipImageProcessor(size={"height": 28, "width": 28})),
    ):
        settings = ImageSettings.of_encoder({"model_type": kind, "image_size": 28})
        assert np.array_equal(settings.pixels(image), processor(image, return_tensors="np")["pixel_values"][0])
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"image_processor_type": "SiglipImageProcessorFast"}}')
    assert ImageSettings.from_folder(tmp_path) == ImageSettings.of_encoder(
        {"model_type": "siglip_vision_model", "image_size": 224}
    )


def test_settings_that_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no preprocessor_config.json"):
        ImageSettings.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Pix2StructImageProcessor"}')
    with pytest.raises(UserError, match="Pix2StructImageProcessor is not known: CLIPImageProcessor"):
        ImageSettings.from_folder(tmp_path)
    with pytest.raises(UserError, match="several sizes"):
        ImageSettings(shortest=28)
    sense = vision(tokenizer).sense
    with pytest.raises(UserError, match="gives 20x20 pixels, the encoder takes 28x28"):
        ImageInput(sense, ImageSettings(size=(20, 20)))
    with pytest.raises(UserError, match="30x56 pixels is no multiple"):
        vision(tokenizer, grids=[(30, 56)])


# Decoding


def same(data):
    """As transformers decodes it."""
    from transformers.image_utils import load_image

    image = Image.open(io.BytesIO(data))
    return np.array_equal(np.asarray(decode(data)), np.asarray(load_image(image)))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_opaque_images_are_as_transformers_loads_them(mode, kind):
    assert same(encoded(picture(1, mode=mode), kind))


def test_cmyk_has_the_right_colours():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert same(encoded(picture(1, mode="CMYK"), kind))
        assert np.abs(np.asarray(decode(encoded(red, kind))).astype(int) - [254, 0, 0]).max() < 8


def test_palettes_and_bits():
    assert same(encoded(picture(2).quantize(16)))
    assert same(encoded(picture(2, mode="L").convert("1")))


def test_transparency_is_over_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 4, 8))
    for data in (encoded(image), encoded(image, "WEBP", lossless=True), encoded(image.quantize(8))):
        pixels = np.asarray(decode(data))
        assert (pixels[:, 5] == 255).all() and (pixels[:, 2] == [200, 0, 0]).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 0])
    assert (np.asarray(decode(encoded(palette, transparency=1))) == 255).all()  # one index of the palette
    assert (np.asarray(decode(encoded(palette, transparency=bytes([255, 128])))) == 127).all()  # an opacity of each
    half = Image.new("LA", (4, 4), (0, 128))
    assert (np.asarray(decode(encoded(half))) == 127).all()


def test_sixteen_bits_are_their_upper_eight():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode(encoded(Image.fromarray(values), kind)))
        assert (pixels == (values >> 8)[..., None]).all()
    with pytest.raises(UserError, match="32 bits .mode F. have no known range"):
        decode(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(4, 40, 24), "JPEG", exif=exif)
    assert same(data) and decode(data).size == ((40, 24) if orientation < 5 else (24, 40))


def png_header(width, height):
    """A PNG that says how large it is and holds nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not an image of a known kind"),
        (b"<html>Not Found</html>", "not an image of a known kind: JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known kind"),  # would start a program
        (png_header(9000, 9000), "9000x9000 pixels: at most 67,108,864 are decoded"),
        (png_header(60000, 60000), "an image of more than 67,108,864 pixels|60000x60000 pixels: at most"),
        (png_header(30000, 30), "one side is more than 200 times"),
        (png_header(30, 30), "a broken image"),
        (encoded(picture(5, 300, 300))[:2000], "a broken image: .*truncated"),
        (encoded(picture(5, 300, 300), "JPEG", quality=95)[:2000], "a broken image: .*truncated"),
        (encoded(picture(5, 300, 300), "GIF")[:2000], "a broken image"),
    ],
)
def test_what_is_no_image_or_too_large(data, says, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library may have left it
    with pytest.raises(UserError, match=says) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_the_size_of_a_file_is_limited(monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="at most 100 are read"):
        decode(encoded(picture()))


# Tiling


GRIDS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
SHAPES = [(h, w) for h in (5, 14, 27, 28, 29, 55, 56, 57, 100, 333) for w in (5, 13, 28, 30, 56, 61, 84, 200, 500)]


@pytest.fixture(scope="module")
def next_model():
    """LlavaNextModel's packing without its weights: a grid of 4 x 4 features an input."""
    from types import SimpleNamespace

    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=28, patch_size=7), image_grid_pinpoints=[list(g) for g in GRIDS]
    )
    return lambda features, size, newline: LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], [size], "full", image_newline=newline
    )[0][0]


def test_gather_indices_equal_the_packing_of_llava_next(next_model):
    import torch
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    newline = torch.tensor([-1.0, -1.0])
    counts = set()
    for shape in SHAPES:
        inputs = image_size_to_num_patches(shape, [list(g) for g in GRIDS], 28)
        assert tiling.count(shape, GRIDS, 28) == inputs
        rows = torch.arange(inputs * 16, dtype=torch.float32)
        expected = next_model(torch.stack([rows, rows + 0.5], -1).view(inputs, 16, 2), shape, newline)
        index = torch.from_numpy(tiling.gather(shape, GRIDS, 28, 4))
        table = torch.cat([torch.stack([rows, rows + 0.5], -1), newline[None]])
        assert table[index].equal(expected), shape
        counts.add(len(index))
    assert len(counts) > 12


def test_tiles_equal_the_image_processor_of_llava_next(tokenizer):
    from transformers import LlavaNextImageProcessor

    processor = LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[list(g) for g in GRIDS]
    )
    config = {"model_type": "clip_vision_model", "hidden_size": 8, "image_size": 28, "patch_size": 7, "num_hidden_layers": 2}
    sense = Sense(Encoder(config), Projector(), token_id(tokenizer, "<image>"), Tiling(GRIDS))
    settings = ImageSettings.from_config(processor.to_dict())
    source = ImageInput(sense, settings)
    wide = [shape for shape in SHAPES if max(shape) < 8 * min(shape)]  # it mistakes 3 lines of pixels for 3 channels
    for k, (height, width) in enumerate(wide[::4]):
        image = picture(k, width, height)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        shape, tokens = source.inspect(encoded(image))
        found = source.inputs(encoded(image), shape)
        assert shape == (height, width) and tokens == len(source.gather(shape))
        assert np.array_equal(found, expected) and len(found) == source.count(shape)


def test_tiles_with_a_downsampling_projector(tokenizer):
    source = vision(tokenizer, side=28, patch=7, downsample=2, grids=GRIDS)
    assert source.sense.tokens == 4 and source.gather((56, 56)).max() == 5 * 4 - 1
    assert source.gather((56, 56)).tolist() == tiling.gather((56, 56), GRIDS, 28, 2).tolist()
    with pytest.raises(UserError, match="a class token has no place"):
        config = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, "num_hidden_layers": 2}
        ImageInput(Sense(Encoder(config, class_token=True), Projector(), 5, Tiling(GRIDS)), ImageSettings.of_encoder(config))
