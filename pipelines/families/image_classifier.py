"""Image classifiers: small convolutional networks of the ResNet kind."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster.config import ImageData, ResNetModel, RunConfig
from pipelines.families.base import (
    Batch,
    Encoder,
    Evaluation,
    EvaluationJob,
    Example,
    Facts,
    Payload,
    Predictor,
    Row,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

EXPECTED_LABELS = 1000
"""Until data was seen; as many as ImageNet has."""
LARGEST_SIDE = 4096
"""Pixels. A file of a few kilobytes can claim to be a picture of gigabytes."""


class ImageClassifier:
    name = "image_classifier"
    payload: Payload = "image"
    route: Literal["completions", "classify"] = "classify"

    def fit_encoder(self, config: RunConfig, sample: pa.Table, labels: Sequence[str]) -> Encoder:
        from pipelines.data import images

        return images.fit(config, sample, labels)

    def expected_facts(self, config: RunConfig) -> Facts:
        assert isinstance(config.data, ImageData)
        labels = [str(number) for number in range(EXPECTED_LABELS)]
        return {"labels": labels, "channels": 3, "image_size": config.data.image_size}

    def blank(self, config: RunConfig, facts: Facts, rows: int) -> Batch:
        import torch

        size = facts["image_size"]
        return {
            "pixel_values": torch.zeros(rows, facts["channels"], size, size),
            "labels": torch.zeros(rows, dtype=torch.int64),
        }

    def build_model(self, config: RunConfig, facts: Facts) -> torch.nn.Module:
        from transformers import AutoModelForImageClassification, ResNetConfig

        model = config.model
        assert isinstance(model, ResNetModel)
        labels = list(facts["labels"])
        shape = ResNetConfig(
            num_channels=facts["channels"],
            embedding_size=model.embedding_size,
            hidden_sizes=list(model.hidden_sizes),
            depths=list(model.depths),
            layer_type=model.layer_type,
            downsample_in_first_stage=model.downsample_in_first_stage,
            id2label=dict(enumerate(labels)),
            label2id={label: place for place, label in enumerate(labels)},
            problem_type="single_label_classification",
        )
        return AutoModelForImageClassification.from_config(shape)

    def example(
        self, config: RunConfig, facts: Facts, row: Row, rng: np.random.Generator | None
    ) -> Example:
        data, channels = config.data, facts["channels"]
        assert isinstance(data, ImageData)
        size = facts["image_size"]
        pixels = np.asarray(row["pixels"]).reshape(size, size, channels).astype(np.float32)
        if rng is not None:
            degrees = rng.uniform(-data.rotate, data.rotate)
            down, right = rng.uniform(-data.shift, data.shift, size=2) * size
            pixels = moved(pixels, degrees, down, right)
        return {
            "pixel_values": normalised(pixels, facts["mean"], facts["std"]),
            "labels": np.asarray(row["label"], dtype=np.int64),
        }

    def collate(self, examples: Sequence[Example]) -> Batch:
        import torch

        return {
            key: torch.from_numpy(np.stack([example[key] for example in examples]))
            for key in ("pixel_values", "labels")
        }

    def count(self, batch: Batch) -> int:
        return len(batch["labels"])

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812 (the name that all of PyTorch's users know)

        logits = model(pixel_values=batch["pixel_values"]).logits
        return F.cross_entropy(logits.float(), batch["labels"], reduction="sum")

    def flops_per_prediction(self, config: RunConfig, facts: Facts) -> float | None:
        return None

    def evaluate(self, job: EvaluationJob) -> Evaluation:
        from pipelines.evaluation import classification

        return classification.evaluate(job)

    def export(
        self, config: RunConfig, model: torch.nn.Module, encoder_folder: Path, target: Path
    ) -> dict[str, str]:
        from pipelines.families import huggingface

        huggingface.export(model, encoder_folder, target)
        return {"library_name": "transformers", "pipeline_tag": "image-classification"}

    def reopen(self, folder: Path) -> torch.nn.Module:
        from transformers import AutoModelForImageClassification

        model: torch.nn.Module = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True
        )
        return model.eval()

    def predictor(self, folder: Path) -> Predictor:
        return ImagePredictor(self.reopen(folder), folder)


class ImagePredictor:
    """A published classifier. Inputs are `{"image": BASE64}` of a PNG or JPEG file, or
    `{"pixels": [[0..255, ...], ...]}` (grey, or colour with a list per pixel), of any size.
    """

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        hugging: Any = model
        self._model: Any = hugging
        self._size = int(settings["size"]["height"])
        self._mean, self._std = settings["image_mean"], settings["image_std"]
        names = hugging.config.id2label
        self._labels = [str(names[place]) for place in range(len(names))]

    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """`label`, its `score` and the `scores` of all labels, per input.

        Raises:
            ValueError: naming the input that cannot be used, and why.
        """
        import torch

        if not inputs:
            return []
        arrays = [self._prepared(place, value) for place, value in enumerate(inputs)]
        with torch.inference_mode():
            tensor = torch.from_numpy(np.stack(arrays)).to(next(self._model.parameters()).device)
            scores = self._model(pixel_values=tensor).logits.float().softmax(-1).cpu()
        return [self._answer(row) for row in scores.tolist()]

    def _prepared(self, place: int, value: Any) -> np.ndarray:
        from pipelines.data.images import resized

        try:
            image = read_input(value)
        except ValueError as error:
            raise ValueError(f"input {place}: {error}") from None
        pixels = resized(image, self._size, len(self._mean)).astype(np.float32)
        return normalised(pixels, self._mean, self._std)

    def _answer(self, scores: list[float]) -> dict[str, Any]:
        best = int(np.argmax(scores))
        return {
            "label": self._labels[best],
            "score": scores[best],
            "scores": dict(zip(self._labels, scores, strict=True)),
        }


def read_input(value: Any) -> np.ndarray:
    """uint8 [height, width, 1 or 3] of one input.

    Raises:
        ValueError: if it is no image, or too large.
    """
    if not isinstance(value, Mapping) or value.keys() not in ({"image"}, {"pixels"}):
        raise ValueError('expected {"image": BASE64} or {"pixels": [[0..255, ...], ...]}')
    return _decoded(value["image"]) if "image" in value else _from_lists(value["pixels"])


def _decoded(text: Any) -> np.ndarray:
    from PIL import Image, ImageOps

    if not isinstance(text, str):
        raise ValueError("image must be a base64 string")
    text = text.partition(",")[2] if text.startswith("data:") else text
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("image is not base64") from None
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG", "JPEG"]) as opened:
            _check_sides(opened.height, opened.width)
            upright = ImageOps.exif_transpose(opened)
            shown = upright.convert("L" if upright.mode in {"1", "L", "LA"} else "RGB")
            pixels = np.asarray(shown)
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        reason = "not a whole PNG or JPEG file" if isinstance(error, OSError) else str(error)
        raise ValueError(f"image cannot be read: {reason}") from None
    return pixels.reshape(shown.height, shown.width, -1)


def _from_lists(rows: Any) -> np.ndarray:
    problem = "pixels must be rows of one length, each pixel 0 to 255 or [red, green, blue]"
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ValueError(problem)
    first = rows[0]
    if not isinstance(first, Sequence) or isinstance(first, str) or not first:
        raise ValueError(problem)
    _check_sides(len(rows), len(first))
    try:
        array = np.asarray(rows)
    except ValueError:
        raise ValueError(problem) from None
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3) or array.dtype.kind not in "iuf":
        raise ValueError(problem)
    if not np.all((array >= 0) & (array <= 255)):  # NaN fails both
        raise ValueError(problem)
    return np.rint(array).astype(np.uint8)


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > LARGEST_SIDE:
        raise ValueError(
            f"the image is {width} x {height} pixels and at most {LARGEST_SIDE} a side are read"
        )


def normalised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """float32 [channels, height, width] from 0..255 [height, width, channels].

    Args:
        mean, std: per channel, of pixels scaled to 0..1.
    """
    scale = np.float32(255) * np.asarray(std, dtype=np.float32)
    centre = np.float32(255) * np.asarray(mean, dtype=np.float32)
    return np.ascontiguousarray(((pixels - centre) / scale).transpose(2, 0, 1), dtype=np.float32)


def moved(pixels: np.ndarray, degrees: float, down: float, right: float) -> np.ndarray:
    """Turn an image about its centre (clockwise as displayed), then shift it, in pixels; bilinear.

    What comes into view continues the border. float32 [height, width, channels] in and out.
    Plain numpy, because it is the loader's innermost work: 64 images of 32 x 32 take 3 ms, and
    SciPy's `affine_transform` 7 ms.
    """
    height, width, channels = pixels.shape
    angle = np.deg2rad(degrees)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    # Target positions relative to the centre, turned back: where each target pixel comes from.
    rows = np.arange(height, dtype=np.float32) - np.float32(middle_y + down)
    columns = np.arange(width, dtype=np.float32) - np.float32(middle_x + right)
    y = (cosine * rows + np.float32(middle_y))[:, None] - (sine * columns)[None]
    x = (sine * rows + np.float32(middle_x))[:, None] + (cosine * columns)[None]
    for positions, size in ((y, height), (x, width)):
        np.maximum(positions, 0, out=positions)
        np.minimum(positions, size - 1, out=positions)
    above = np.minimum(y.astype(np.int32), height - 2)
    before = np.minimum(x.astype(np.int32), width - 2)
    part_y, part_x = (y - above)[..., None], (x - before)[..., None]
    corner = above * width + before
    flat = pixels.reshape(height * width, channels)
    upper = _between(flat.take(corner, axis=0), flat[1:].take(corner, axis=0), part_x)
    flat = flat[width:]
    lower = _between(flat.take(corner, axis=0), flat[1:].take(corner, axis=0), part_x)
    return _between(upper, lower, part_y)


def _between(low: np.ndarray, high: np.ndarray, part: np.ndarray) -> np.ndarray:
    """`low + part * (high - low)`, in the memory of `high`."""
    high -= low
    high *= part
    high += low
    return high


FAMILY = ImageClassifier()
