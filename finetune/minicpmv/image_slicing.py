"""How a picture becomes slices: the checkpoints' adaptive slicing, its placeholder text and its pixels.

All sizes are (width, height) in pixels and all grids (columns, rows), unless a name says otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from PIL import ExifTags, Image

MEAN, STD = 0.5, 0.5  # per channel, on pixel values in 0..1
# By EXIF orientation. Any other value, which may be a text too, turns nothing.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def fit_size(size: tuple[int, int], scale_resolution: int, patch_size: int, allow_upscale: bool) -> tuple[int, int]:
    """Size with the picture's aspect ratio and about `scale_resolution ** 2` pixels, sides multiples of a patch.

    A picture with fewer pixels keeps its size (rounded to patches) unless `allow_upscale`.

    Example: fit_size((1000, 500), 448, 14, True) == (630, 322).
    """
    width, height = size
    if allow_upscale or width * height > scale_resolution**2:
        ratio = width / height
        height = int(scale_resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _to_multiple(width, patch_size), _to_multiple(height, patch_size)


def plan_slices(
    size: tuple[int, int], max_slice_nums: int, scale_resolution: int = 448, patch_size: int = 14
) -> tuple[tuple[int, int], tuple[int, int] | None, tuple[int, int] | None]:
    """How a picture of this size is cut.

    The number of slices follows from the pixel count; among grids of that number of cells, one less and one more,
    the one whose shape is nearest to the picture's is taken (nearest in the logarithm of the aspect ratio).

    Args:
        size: of the picture.
        max_slice_nums: most slices beside the overview; 1 means the overview alone.

    Returns:
        size of the overview; the grid and the size of one slice, both None when the overview is all.

    Example: plan_slices((1000, 500), 9) == ((630, 322), (2, 1), (448, 448)).
    """
    width, height = size
    wanted = min(math.ceil(width * height / scale_resolution**2), max_slice_nums)
    if wanted <= 1:
        return fit_size(size, scale_resolution, patch_size, allow_upscale=True), None, None
    overview = fit_size(size, scale_resolution, patch_size, allow_upscale=False)
    log_ratio = math.log(width / height)
    grids = [
        (columns, cells // columns)
        for cells in (wanted - 1, wanted, wanted + 1)
        if 1 < cells <= max_slice_nums
        for columns in range(1, cells + 1)
        if cells % columns == 0
    ]
    grid = min(grids, key=lambda g: abs(log_ratio - math.log(g[0] / g[1])))
    columns, rows = grid
    cell = (_to_multiple(width, columns) / columns, _to_multiple(height, rows) / rows)
    return overview, grid, fit_size(cell, scale_resolution, patch_size, allow_upscale=True)


def slice_image(
    image: Image.Image, max_slice_nums: int = 9, scale_resolution: int = 448, patch_size: int = 14
) -> tuple[list[Image.Image], tuple[int, int] | None]:
    """The overview followed by the slices row by row, and the grid (None without slices)."""
    overview_size, grid, cell = plan_slices(image.size, max_slice_nums, scale_resolution, patch_size)
    pictures = [_resized(image, overview_size)]
    if grid is not None:
        columns, rows = grid
        width, height = cell
        whole = _resized(image, (width * columns, height * rows))
        pictures += [
            whole.crop((c * width, r * height, (c + 1) * width, (r + 1) * height))
            for r in range(rows)
            for c in range(columns)
        ]
    return pictures, grid


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def placeholder(grid: tuple[int, int] | None) -> str:
    """Text that stands for a picture: overview, then slices with rows on lines. Each slice's one `<unk>` becomes as
    many tokens as the resampler has queries, see `encode_text`."""
    one = "<image><unk></image>"
    if grid is None:
        return one
    columns, rows = grid
    return one + "<slice>" + "\n".join([one * columns] * rows) + "</slice>"


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it, in RGB: turned as its EXIF data says, transparency on white, the brightness
    range of 16-bit and floating-point pictures brought to 8 bits; of animations the first frame."""
    image.load()  # with which Pillow turns a TIFF itself
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith(("I", "F")):
        return _deep_gray(image).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, "white")
    rgb.paste(image, mask=image)
    return rgb


def _deep_gray(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit integers (Pillow holds 16 bits of brightness in both) and floats, in 0..1 or 0..255, as L."""
    values = np.nan_to_num(np.array(image, dtype=np.float32), copy=False)
    values *= 1 / 257 if image.mode.startswith("I") else 255 if values.max() <= 1 else 1
    return Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))


def raw_pixels(image: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 (3, H, W), to be normalised on the model's device: a quarter of the bytes to carry there
    and no arithmetic on the way. Not to be written to: it shares a Python object's memory."""
    with warnings.catch_warnings():
        # A copy would take longer than all else that is done for a small picture.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1, bit for bit torchvision's ToTensor and Normalize(0.5, 0.5)."""
    return pixels.float().div_(255).sub_(MEAN).div_(STD)


def normalised_pixels(image: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 (3, H, W) in -1..1."""
    return normalise(raw_pixels(image)).contiguous()


def slicing_of(slice_config: Mapping | None, patch_size: int = 14) -> dict[str, int]:
    """The three slicing settings from a mapping that may lack some; None or empty means the overview alone."""
    config = slice_config or {"max_slice_nums": 1}
    return {
        "max_slice_nums": int(config.get("max_slice_nums") or 9),
        "scale_resolution": int(config.get("scale_resolution") or 448),
        "patch_size": int(config.get("patch_size") or patch_size),
    }


def _to_multiple(length: float, divisor: int) -> int:
    return max(round(length / divisor) * divisor, divisor)
