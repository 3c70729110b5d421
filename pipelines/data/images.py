"""Images: files and the builtin digits to documents, documents to rows of one size.

An image is uint8 [height, width, channels] in row-major order. It is resized as it is read, so that
a partition of photographs stays small; duplicates are told by the pixels before that.
"""

import io
import json
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.config import ImageData
from cluster.errors import SourceError
from pipelines.data.sources import DIGITS_SOURCE, Reject, SourceFile, columnar, open_binary
from pipelines.data.sources.decoding import decode
from pipelines.data.sources.files import COLUMNAR
from pipelines.data.sources.opening import why

if TYPE_CHECKING:
    from cluster.config import RunConfig

SAMPLE_BYTES = 64 << 20
"""Pixels that mean and deviation are measured on."""
MODES = {1: "L", 3: "RGB"}
MAX_BYTES = 256 << 20
"""Of an encoded picture."""
DAMAGE = (
    ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error,
    zlib.error,
)  # fmt: skip
"""What Pillow raises over a damaged picture, and over what a camera noted beside its pixels."""


@dataclass(frozen=True)
class RawImage:
    """One labelled image, resized."""

    row: int | None
    pixels: np.ndarray
    original: bytes
    """Shape and pixels before resizing: what makes two images the same."""
    label: str


@dataclass(frozen=True)
class ImageEncoder:
    """Labelled images to rows of pixels. Plain data; see `families.base.Encoder`."""

    labels: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]

    def facts(self) -> dict[str, Any]:
        return {
            "labels": list(self.labels),
            "image_size": self.image_size,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def encode(self, documents: pa.Table) -> pa.Table:
        """Rows of `pixels`, `label` (place in `labels`) and `document`."""
        place = {label: number for number, label in enumerate(self.labels)}
        images = [resized(image, self.image_size, self.channels) for image in arrays(documents)]
        flat = np.stack(images).reshape(-1)
        width = self.image_size**2 * self.channels
        labels = [place[label] for label in documents.column("label").to_pylist()]
        return pa.table(
            {
                "pixels": pa.FixedSizeListArray.from_arrays(pa.array(flat), width),
                "label": pa.array(labels, pa.int32()),
                "document": documents.column("document").combine_chunks(),
            }
        )

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json` as `AutoImageProcessor` reads it, and `labels.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": 2,  # PIL's number for bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        labels = json.dumps(self.labels, indent=2, ensure_ascii=False)
        (folder / "labels.json").write_text(labels + "\n", encoding="utf-8")


def fit(config: "RunConfig", sample: pa.Table, labels: Sequence[str]) -> ImageEncoder:
    """Measure mean and deviation per channel on a sample of the training images.

    Raises:
        SourceError: if there are fewer than two labels to tell apart.
    """
    data = config.data
    assert data.kind == "image"
    if len(labels) < 2:
        raise SourceError(
            f"the training images have {len(labels)} label{'s' * (len(labels) != 1)} "
            f"({', '.join(labels)}) and telling apart needs 2: give a folder with one folder per "
            "class"
        )
    images = [resized(image, data.image_size, data.channels) for image in arrays(sample)]
    values = np.stack(images).reshape(-1, data.channels)
    mean = values.mean(axis=0, dtype=np.float64) / 255
    # A channel without any contrast would be divided by zero.
    std = np.maximum(values.std(axis=0, dtype=np.float64) / 255, 1e-3)
    return ImageEncoder(
        tuple(labels),
        data.image_size,
        data.channels,
        tuple(round(float(m), 6) for m in mean),
        tuple(round(float(s), 6) for s in std),
    )


def resized(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """uint8 [size, size, channels], bilinear; grey and colour are converted to each other."""
    from PIL import Image

    if image.shape == (size, size, channels):
        return image
    shown = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    shown = shown.convert(MODES[channels]).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(shown).reshape(size, size, channels)


def arrays(documents: pa.Table) -> Iterator[np.ndarray]:
    """The images of a document table, uint8 [height, width, channels]."""
    columns = documents.select(["pixels", "height", "width", "channels"]).to_pydict()
    for pixels, height, width, channels in zip(*columns.values(), strict=True):
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, channels)


def read_images(file: SourceFile, data: ImageData) -> Iterator[RawImage | Reject]:
    """The images of one file.

    The label of a picture of its own is the first folder inside of the source. In a Parquet or
    Arrow file, each row has an encoded picture (bytes, or a struct with a field `bytes` as Hugging
    Face writes it) and its label: text, or a number, which a saved dataset gives a name.
    """
    try:
        if file.path == DIGITS_SOURCE:
            yield from _digits(data)
        elif file.extension in COLUMNAR:
            yield from _table(file, data)
        else:
            yield _picture(file, data)
    except OSError as error:
        yield Reject(file.path, None, why(error))


def _picture(file: SourceFile, data: ImageData) -> RawImage | Reject:
    label, separator, _ = file.inside.partition("/")
    if not separator:
        return Reject(file.path, None, "no class: it lies in no folder of the source")
    with open_binary(file) as stream:
        raw = stream.read(MAX_BYTES + 1)
    return _labelled(file, None, raw, label, data)


def _table(file: SourceFile, data: ImageData) -> Iterator[RawImage | Reject]:
    columns = [file.reading.image, file.reading.label]
    names = _class_names(columnar.schema(file), file.reading.label)
    for row in columnar.rows(file, columns):
        picture, label = row.cells
        if isinstance(picture, dict):
            picture = picture.get("bytes")
        if isinstance(label, int) and names and 0 <= label < len(names):
            label = names[label]
        if isinstance(label, bytes):
            label = decode(label)
        if not isinstance(picture, bytes):
            yield Reject(file.path, row.number, f"no picture in column `{columns[0]}`")
        elif not isinstance(label, str | int) or label == "":
            yield Reject(file.path, row.number, f"no class in column `{columns[1]}`")
        else:
            yield _labelled(file, row.number, picture, str(label), data)


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """What `datasets` noted about a column of numbers; empty where it noted nothing."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])
        names = noted["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if plain else []


def _labelled(
    file: SourceFile, row: int | None, raw: bytes, label: str, data: ImageData
) -> RawImage | Reject:
    if len(raw) > MAX_BYTES:
        return Reject(file.path, row, f"over {MAX_BYTES} bytes: no picture to train on")
    try:
        image = _decode(raw, data.channels)
    except DAMAGE as error:
        # Their text may quote the file.
        return Reject(file.path, row, f"not a whole PNG or JPEG image ({type(error).__name__})")
    return _raw(row, image, label, data)


def _decode(raw: bytes, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # Pillow warns of what it can do without; too many pixels to be honest are damage.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(raw), formats=["PNG", "JPEG"]) as opened:
                shown = ImageOps.exif_transpose(opened).convert(MODES[channels])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError("too many pixels") from error
    return np.asarray(shown).reshape(shown.height, shown.width, channels)


def _digits(data: ImageData) -> Iterator[RawImage]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey values come as 0..16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    for row, (image, target) in enumerate(zip(images, digits.target, strict=True)):
        yield _raw(row, image, str(target), data)


def _raw(row: int | None, image: np.ndarray, label: str, data: ImageData) -> RawImage:
    original = f"{image.shape}".encode() + image.tobytes()
    return RawImage(row, resized(image, data.image_size, data.channels), original, label)
