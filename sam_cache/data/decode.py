"""From the bytes of an image file to uint8 RGB, or an ImageError that says why not."""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from sam_cache.errors import ImageError
from sam_cache.types import ImageRecord

# Pillow's own refusal limit (twice Image.MAX_IMAGE_PIXELS). A PNG of 109 kB can unfold to 2.7 GB.
PIXEL_LIMIT = 178_956_970

# What photographs, scans and micrographs come in. Pillow also opens formats that start other
# programs (EPS runs Ghostscript); strangers' files must not reach those.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "GIF", "BMP", "JPEG2000", "PPM")

ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Decoded:
    """`image` is (H, W, 3) uint8 RGB as displayed; `notes` say what was done to get there."""

    image: np.ndarray
    notes: tuple[str, ...] = ()


def decode(data: bytes, record: ImageRecord, intensity: str = "full") -> Decoded:
    """Decode an image file, strictly: what is truncated or damaged is no image.

    The size and the orientation are read from the header first, so that a file that would unfold to
    more than `PIXEL_LIMIT` pixels, or does not fit `record`, is refused before it costs anything.
    EXIF orientation is applied, unless only the size before the turn fits the record's. Alpha is
    dropped, grey is repeated, of an animation the first frame counts. 16-bit values are divided by
    257 (`intensity="full"`) or stretched between their 1st and 99th percentile (`"percentile"`);
    other wide types, such as float, are always stretched.

    Raises ImageError: not an image, damaged, too large, or of another size than the record.
    """
    height, width, orientation = _read_header(data, record)
    orientation, notes = _choose_orientation(height, width, orientation, record)
    array = _decode_array(data, record)
    if array.shape[:2] != (height, width):
        raise ImageError(f"{record.path}: decodes to another size than its header says; save it again")
    image, scaled = _to_rgb(array, intensity, record)
    notes += scaled
    if np.count_nonzero(image > 12) < 0.001 * image.size:
        notes.append("all dark")
    return Decoded(np.ascontiguousarray(_turn(image, orientation)), tuple(notes))


def _read_header(data: bytes, record: ImageRecord) -> tuple[int, int, int]:
    """Height, width and EXIF orientation of the stored pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
            format = header.format
            try:
                orientation = header.getexif().get(ORIENTATION, 1)
            except Exception:  # Pillow's EXIF reader fails in many ways; a photograph without it is still one
                orientation = 1
    except Exception as error:  # UnidentifiedImageError, DecompressionBombError, SyntaxError, struct.error, ...
        reason = str(error) if "pixels" in str(error) else "not an image in a known format, or its header is damaged"
        raise ImageError(f"{record.path}: {reason}") from None
    if width * height > PIXEL_LIMIT:
        raise ImageError(f"{record.path}: {width}x{height} is over the limit of {PIXEL_LIMIT} pixels; cut it in tiles")
    if format == "TIFF" or orientation not in range(1, 9):
        orientation = 1  # both decoders turn TIFF themselves, and Pillow's header has the size after the turn
    return height, width, orientation


def _choose_orientation(height: int, width: int, orientation: int, record: ImageRecord) -> tuple[int, list[str]]:
    """The orientation to apply so that the image fits its record, displayed if it can be; what to say about it."""
    stored, shown = (height, width), (width, height) if orientation >= 5 else (height, width)
    expected = (record.height, record.width)
    if expected == (0, 0) or shown == expected:
        if orientation == 1:
            return 1, []
        ambiguous = stored == expected
        return orientation, [f"exif orientation {orientation} applied"] + ["exif ambiguous"] * ambiguous
    if stored == expected:
        return 1, [f"exif orientation {orientation} ignored"]
    raise ImageError(
        f"{record.path}: size {shown[1]}x{shown[0]} differs from {record.width}x{record.height} "
        "in the annotation; correct the one that is wrong"
    )


def _decode_array(data: bytes, record: ImageRecord) -> np.ndarray:
    """The stored pixels: OpenCV's array, or Pillow's in the same channel order where OpenCV has none.

    `imdecode` returns nothing for a truncated JPEG (since OpenCV 4.11); `imread` would return a picture, half of
    it grey.
    IMREAD_UNCHANGED also keeps it from turning the image by EXIF.
    """
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        array = None
    if array is not None:
        return array
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))[:, :, ::-1]
    except Exception as error:
        raise ImageError(f"{record.path}: damaged ({error}); get the file again") from None


def _to_rgb(array: np.ndarray, intensity: str, record: ImageRecord) -> tuple[np.ndarray, list[str]]:
    """Three channels of uint8 in the order RGB, from OpenCV's 1, 3 (BGR) or 4 (BGRA) of any type."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    if channels not in (1, 3, 4):
        raise ImageError(f"{record.path}: has {channels} channels; save the three to be used as RGB")
    colour = array[:, :, :3] if channels > 1 else array.reshape(*array.shape[:2], 1)
    notes = []
    if colour.dtype == np.uint16 and intensity == "full":
        colour = cv2.convertScaleAbs(colour, alpha=1 / 257).reshape(colour.shape)
        notes = ["16-bit scaled by full range"]
    elif colour.dtype != np.uint8:
        notes = [f"{colour.dtype} scaled by percentiles"]
        colour = _stretch(colour)
    if colour.shape[2] == 1:
        return cv2.cvtColor(colour, cv2.COLOR_GRAY2RGB), notes
    return cv2.cvtColor(np.ascontiguousarray(colour), cv2.COLOR_BGR2RGB), notes


def _stretch(values: np.ndarray) -> np.ndarray:
    """uint8 from any numbers: the 1st percentile becomes 0, the 99th 255; what is not finite becomes 0."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = np.percentile(values[finite], (1, 99)) if finite.any() else (0, 0)
    scaled = (np.where(finite, values, low) - low) * (255 / (high - low) if high > low else 0)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """The eight EXIF orientations: 5 to 8 swap the axes, then rows or columns are mirrored."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
