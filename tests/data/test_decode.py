import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from sam_cache.data.decode import PIXEL_LIMIT, decode
from sam_cache.errors import ImageError
from sam_cache.types import ImageRecord

GRADIENT = (np.mgrid[:30, :40][0] * 5 + np.mgrid[:30, :40][1])[:, :, None] * np.uint8([1, 2, 1]) % 250
ANY = ImageRecord(1, "any.png")


def encode(array, suffix=".png"):
    return cv2.imencode(suffix, array)[1].tobytes()


def save(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def with_orientation(orientation, format="JPEG", size=(40, 30)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if format == "TIFF" else {"exif": exif}
    if format == "WEBP":
        options["lossless"] = True
    return save(Image.fromarray(GRADIENT.astype(np.uint8)).resize(size), format, **options)


# What each odd file is to us: (height, width) as displayed, or words of the error.
ODD = {
    "elongated/image01713.jpg": (500, 49),
    "elongated/image01980.jpg": (25, 284),
    "elongated/meadow_cube.jpg": (12288, 2048),
    **{f"exif_orientation/landscape_{orientation}.jpg": (450, 600) for orientation in range(1, 9)},
    "libvips/cogs.gif": (77, 85),
    "libvips/indexed.png": (442, 290),
    "libvips/rgba.png": (128, 128),
    "libvips/sample.jpg": (442, 290),
    "libvips/sample.png": (442, 290),
    "libvips/truncated.gif": "damaged",
    "libvips/truncated.jpg": "damaged",
    "pillow/16bit.cropped.tif": (64, 64),
    "pillow/avif_hopper.avif": (128, 128),
    "pillow/broken.png": "not an image",
    "pillow/broken_data_stream.png": "damaged",
    "pillow/bw_gradient.png": (10, 256),
    "pillow/decompression_bomb.gif": "exceeds limit",
    "pillow/dispose_bgnd_rgba.gif": (100, 100),
    "pillow/g4_orientation_5.tif": (88, 590),
    "pillow/high_ascii_chars.png": (30, 750),
    "pillow/hopper.Lab.tif": (128, 128),
    "pillow/hopper.jpg": (128, 128),
    "pillow/hopper.webp": (128, 128),
    "pillow/hopper_bad_exif.jpg": (500, 500),
    "pillow/hopper_float_dpi_2.tif": (128, 128),
    "pillow/hopper_gray.jpg": (128, 128),
    "pillow/hopper_jpg.tif": (128, 128),
    "pillow/hopper_orientation_5.webp": (128, 128),
    "pillow/hopper_orientation_6.jpg": (128, 128),
    "pillow/hopper_orientation_8.jpg": (128, 128),
    "pillow/i_trns.png": (64, 64),
    "pillow/iss634.gif": (245, 245),
    "pillow/jfif_unit_cm.jpg": (1, 1),
    "pillow/junk_jpeg_header.jpg": (768, 1024),
    "pillow/p_16.png": (128, 128),
    "pillow/pil123rgba.png": (150, 162),
    "pillow/pil_sample_cmyk.jpg": (100, 100),
    "pillow/tRNS_null_1x1.png": (1, 1),
    "pillow/tga_common_200x32_la.png": (32, 200),
    "pillow/transparent.png": (150, 200),
    "pillow/truncated_jpeg.jpg": "damaged",
    "pillow/ultrahdr.jpg": "damaged",  # its main picture ends after 16 of 2,688 rows; Pillow refuses it too
    "pillow/xmp_tags_orientation.png": (268, 326),
}
# Where Pillow's picture is another one: it does not scale 16-bit values, and converts CIELAB roughly.
UNLIKE_PILLOW = {"16bit.cropped.tif", "i_trns.png", "hopper.Lab.tif"}


@pytest.mark.parametrize("name", ODD)
def test_odd_files(real_data, name):
    data, record = (real_data / "odd" / name).read_bytes(), ImageRecord(1, name)
    if isinstance(ODD[name], str):
        with pytest.raises(ImageError, match=ODD[name]) as error:
            decode(data, record)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        return
    image = decode(data, record).image
    assert image.dtype == np.uint8
    assert image.shape == (*ODD[name], 3)
    assert image.flags.c_contiguous
    if name.rpartition("/")[2] in UNLIKE_PILLOW or name.endswith("bad_exif.jpg"):  # Pillow warns about the latter
        return
    with Image.open(io.BytesIO(data)) as oracle:
        shown = ImageOps.exif_transpose(oracle)
        expected = np.asarray(shown.convert("RGB" if shown.mode in ("RGB", "CMYK") else "RGBA"))[:, :, :3]
    assert cv2.absdiff(image, np.ascontiguousarray(expected)).max() <= 2  # 2: CMYK; 1: 16-bit PNG; 0: all others


def test_all_odd_files_are_in_the_table(real_data):
    files = {path.relative_to(real_data / "odd").as_posix() for path in (real_data / "odd").rglob("*.*")}
    assert files == set(ODD)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_as_pillow_turns_it(format, orientation):
    data = with_orientation(orientation, format)
    with Image.open(io.BytesIO(data)) as oracle:
        expected = np.asarray(ImageOps.exif_transpose(oracle))
    found = decode(data, ANY)
    np.testing.assert_array_equal(found.image, expected)
    if format != "TIFF":  # OpenCV and Pillow turn those without being asked
        assert found.notes == (() if orientation == 1 else (f"exif orientation {orientation} applied",))


def test_orientation_gives_way_to_the_annotation():
    turned = with_orientation(6)  # stored 40 wide and 30 high, displayed 30 wide and 40 high
    assert decode(turned, ImageRecord(1, "a", 40, 30)).image.shape == (40, 30, 3)
    stored = decode(turned, ImageRecord(1, "a", 30, 40))
    assert stored.image.shape == (30, 40, 3)
    assert stored.notes == ("exif orientation 6 ignored",)
    np.testing.assert_array_equal(stored.image, decode(with_orientation(1), ANY).image)
    with pytest.raises(ImageError, match="size 30x40 differs from 31x40 in the annotation"):
        decode(turned, ImageRecord(1, "a", 40, 31))


@pytest.mark.parametrize(("orientation", "size"), [(3, (40, 30)), (6, (30, 30))])
def test_where_both_fit_the_displayed_one_wins_and_says_so(orientation, size):
    data = with_orientation(orientation, "PNG", size)
    found = decode(data, ImageRecord(1, "a", size[1], size[0]))
    assert found.notes == (f"exif orientation {orientation} applied", "exif ambiguous")
    with Image.open(io.BytesIO(data)) as oracle:
        np.testing.assert_array_equal(found.image, np.asarray(ImageOps.exif_transpose(oracle)))


def test_size_mismatch_of_a_real_pair(real_data):
    data = (real_data / "davis_frames/images/judo/00005.jpg").read_bytes()
    with pytest.raises(ImageError, match="size 854x480 differs from 853x480 in the annotation"):
        decode(data, ImageRecord(1, "judo/00005.jpg", 480, 853))


def test_16_bit():
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    full = decode(encode(values), ANY)
    assert full.notes == ("16-bit scaled by full range",)
    np.testing.assert_array_equal(full.image[:, :, 1], np.rint(values / 257))
    # Twelve bits in sixteen: nearly black by the full range, all of it by percentiles.
    dim = values // 256
    assert decode(encode(dim), ANY).notes == ("16-bit scaled by full range", "all dark")
    stretched = decode(encode(dim), ANY, "percentile")
    assert stretched.notes == ("uint16 scaled by percentiles",)
    low, high = np.percentile(dim, (1, 99))
    np.testing.assert_array_equal(stretched.image[:, :, 0], np.rint(np.clip((dim - low) / (high - low), 0, 1) * 255))


def test_16_bit_colour_with_alpha():
    colour = np.full((5, 6, 4), (257 * 3, 257 * 20, 257 * 100, 9), np.uint16)  # BGRA
    assert decode(encode(colour), ANY).image[2, 3].tolist() == [100, 20, 3]


def test_float_tiff_is_stretched_and_holes_are_dark():
    values = np.linspace(-1, 1, 1200, dtype=np.float32).reshape(30, 40)
    values[0, 0] = np.nan
    found = decode(encode(values, ".tiff"), ANY)
    assert found.notes == ("float32 scaled by percentiles",)
    assert found.image[0, 0].tolist() == [0, 0, 0]
    assert found.image[-1, -1].tolist() == [255, 255, 255]


def test_real_16_bit_geotiff(real_data):
    data = (real_data / "spacenet_sample/sample_geotiff.tif").read_bytes()
    record = ImageRecord(1, "sample_geotiff.tif", 900, 900)
    assert "all dark" in decode(data, record).notes
    assert decode(data, record, "percentile").image.std() > 40


def test_alpha_is_dropped():
    colour = np.dstack([np.full((4, 4, 3), 90, np.uint8), np.zeros((4, 4), np.uint8)])
    assert (decode(encode(colour), ANY).image == 90).all()


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.98])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_no_images(format, kept):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = save(Image.fromarray(noise), format)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * kept)], ANY)


def test_png_bomb_is_refused_by_its_header(monkeypatch):
    side = 60_000
    header = b"IHDR" + side.to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    assert side * side > PIXEL_LIMIT
    chunk = (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + (99).to_bytes(4) + b"IDAT"
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="pixels"):
        decode(bomb, ANY)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"text" * 99]
)
def test_what_is_no_image(data):
    with pytest.raises(ImageError, match=r"any\.png: not an image"):
        decode(data, ANY)
