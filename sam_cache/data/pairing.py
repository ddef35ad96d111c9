"""Which mask files belong to which image, by a pattern."""

import bisect
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sam_cache.data.paths import list_files
from sam_cache.errors import DatasetError


def pair_masks(images: Sequence[str], masks: Sequence[str], pattern: str) -> list[list[str]]:
    """For each image the masks that `pattern` names, both as sorted relative paths.

    In the pattern `{stem}` is the image's file name without suffix and `{dir}` its folder below the
    image root; `*` stands for anything within the file name, and a final `.*` for any one suffix.
    The result is a path below the mask root; `..` may be used to step from one folder to its
    neighbour. A pattern without a slash is looked for in the same subfolder as the image.
    """
    check_pattern(pattern)
    if "/" not in pattern:
        pattern = "{dir}/" + pattern
    return [_match(PurePosixPath(image), masks, pattern) for image in images]


def pair_folders(images: Path, masks: Path, pattern: str) -> tuple[dict[str, list[str]], list[str]]:
    """Each image below `images` that has masks below `masks`, with those; and notes about what has no partner.

    What is the mask of one image is never itself an image, so both may share a folder. Where two files
    could each be the other's mask, such as a.jpg and a.png of one folder, the JPEG is the image.
    """
    # Whole paths tell whether an image and a mask are one file; as text, for there may be a million.
    image_files, mask_files = list_files(images), list_files(masks)
    matches = zip(image_files, pair_masks(list(image_files), list(mask_files), pattern), strict=True)
    found = {image: [mask for mask in group if mask_files[mask] != image_files[image]] for image, group in matches}
    partners = {image_files[image]: {mask_files[mask] for mask in group} for image, group in found.items()}

    def is_reversed(image: str, mask: str) -> bool:
        return _is_jpeg(mask) and not _is_jpeg(image) and image in partners.get(mask, ())

    found = {
        image: [mask for mask in group if not is_reversed(image_files[image], mask_files[mask])]
        for image, group in found.items()
    }
    taken = {mask_files[mask] for group in found.values() for mask in group}
    claimed = [image for image in found if image_files[image] in taken]
    found = {image: group for image, group in found.items() if image_files[image] not in taken}
    pairs = {image: group for image, group in found.items() if group}
    if not pairs:
        raise DatasetError(
            f"{images}: none of its {len(image_files)} images has a mask called {pattern!r} in {masks}; "
            "give the right --mask-pattern"
        )
    lonely_images = [image for image in found if image not in pairs]
    others = taken | {image_files[image] for image in found}
    lonely_masks = [mask for mask, file in mask_files.items() if file not in others and _may_be_mask(mask, pattern)]
    used = {mask_files[mask] for group in pairs.values() for mask in group}
    mutual = [image for image in claimed if image_files[image] not in used]
    notes = [
        f"{len(names)} {what}, left out: {', '.join(names)}"
        for what, names in (
            ("images without a mask", lonely_images),
            ("masks without an image", lonely_masks),
            ("files that could be each other's mask (--mask-pattern tells which is)", mutual),
        )
        if names
    ]
    return pairs, notes


def check_pattern(pattern: str) -> None:
    folder, _, name = pattern.rpartition("/")
    unknown = set(re.findall(r"{.*?}", pattern)) - {"{stem}", "{dir}"}
    if unknown or "*" in folder or not name:
        raise DatasetError(
            f"mask pattern {pattern!r}: use {{stem}}, {{dir}} and, in the file name only, *; "
            "for example '{stem}_mask.png' or '{dir}/../masks/*'"
        )


def has_many_files(pattern: str) -> bool:
    """Whether the pattern asks for one file per object: a `*` that is more than the suffix."""
    return "*" in pattern.removesuffix(".*")


def _is_jpeg(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg")


def _may_be_mask(name: str, pattern: str) -> bool:
    """Whether a file could be the mask of some image: among the others an unpaired one is no news."""
    expression = _as_expression(posixpath.basename(pattern).replace("{stem}", "*"))
    return re.fullmatch(expression, posixpath.basename(name)) is not None


def _match(image: PurePosixPath, masks: Sequence[str], pattern: str) -> list[str]:
    wanted = posixpath.normpath(pattern.replace("{dir}", str(image.parent)).replace("{stem}", image.stem))
    expression = re.compile(_as_expression(wanted))
    # `masks` is sorted: all that begin with the part before the first star stand together.
    prefix = wanted.partition("*")[0]
    first = bisect.bisect_left(masks, prefix)
    last = bisect.bisect_right(masks, prefix, key=lambda mask: mask[: len(prefix)])
    return [mask for mask in masks[first:last] if expression.fullmatch(mask)]


def _as_expression(pattern: str) -> str:
    suffix = r"\.[^./]+" if pattern.endswith(".*") else ""
    return "[^/]*".join(map(re.escape, (pattern.removesuffix(".*") if suffix else pattern).split("*"))) + suffix
