"""Images: documents by class, rows of one size, and the preprocessor that a model carries."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.config import ImageData, RunConfig
from cluster.errors import SourceError
from pipelines.data import documents, images, sources
from pipelines.data.images import ImageEncoder
from tests import fakes


def config(*overrides: str) -> RunConfig:
    return fakes.config("digits-cnn", *overrides)


def read(source: str, config: RunConfig) -> documents.Documents:
    return documents.read(sources.listing([source], "image").files, config.data, 3)


def fitted(config: RunConfig, source: str) -> tuple[ImageEncoder, documents.Documents]:
    found = read(source, config)
    labels = sorted(set(found.table.column("label").to_pylist()))
    return images.fit(config, found.table, labels), found


def test_digits_become_rows() -> None:
    encoder, found = fitted(config(), "builtin:digits")
    assert found.table.num_rows == 1797
    assert encoder.labels == tuple("0123456789")
    rows = encoder.encode(found.table.slice(0, 5)).to_pylist()
    assert [row["label"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["document"] for row in rows] == [3 << 32 | i for i in range(5)]
    assert {len(row["pixels"]) for row in rows} == {32 * 32}
    assert max(rows[0]["pixels"]) > 200
    assert 0.2 < encoder.mean[0] < 0.4 < 1 < 2
    assert encoder.facts()["image_size"] == 32


def test_folders_are_classes_and_damage_is_quarantined(tmp_path: Path) -> None:
    for label, colour in (("猫", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / label).mkdir()
        Image.new("RGB", (9, 5), colour).save(tmp_path / label / "a.png")
    Image.new("L", (3, 3), 77).save(tmp_path / "dog" / "grey.jpg")
    Image.new("RGB", (3, 3)).save(tmp_path / "astray.png")
    (tmp_path / "dog" / "broken.png").write_bytes(b"\x89PNG nothing")
    whole = (tmp_path / "dog" / "a.png").read_bytes()
    (tmp_path / "dog" / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "bomb.png").write_bytes(bomb())
    colour_config = config("data.channels=3", "data.image_size=4")
    encoder, found = fitted(colour_config, str(tmp_path))
    assert found.table.column("label").to_pylist() == ["dog", "dog", "猫"]
    rejected = {Path(r.file).name: r.reason for r in found.leavings.rejects}
    assert rejected.keys() == {"astray.png", "broken.png", "short.png", "bomb.png"}
    rows = encoder.encode(found.table).to_pylist()
    assert rows[2]["pixels"] == [255, 0, 0] * 16  # row-major, channels last
    assert rows[0]["pixels"] == [0, 0, 255] * 16
    assert [row["label"] for row in rows] == [0, 0, 1]


def bomb() -> bytes:
    """A PNG head that promises 60,000 x 60,000 pixels."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    crc = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + crc


def test_same_pixels_have_the_same_digest_whatever_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8))
    noise.save(tmp_path / "a" / "1.png", compress_level=0)
    noise.save(tmp_path / "a" / "2.png", compress_level=9)
    noise.rotate(90).save(tmp_path / "a" / "3.png")
    digests = read(str(tmp_path), config()).table.column("digest").to_pylist()
    assert digests[0] == digests[1] != digests[2]


def test_one_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "only" / "a.png")
    found = read(str(tmp_path), config())
    with pytest.raises(SourceError, match="1 label "):
        images.fit(config(), found.table, ["only"])


def test_saved_preprocessor_gives_what_training_saw(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    settings = config("data.channels=3", "data.image_size=8")
    assert isinstance(settings.data, ImageData)
    encoder = ImageEncoder(("a", "猫"), 8, 3, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    encoder.save(tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == ["a", "猫"]
    picture = np.random.default_rng(1).integers(0, 256, (20, 12, 3), dtype=np.uint8)
    opened = AutoImageProcessor.from_pretrained(tmp_path)
    got = np.asarray(opened(Image.fromarray(picture), return_tensors="np")["pixel_values"])[0]
    seen = images.resized(picture, 8, 3) / 255
    expected = (seen - np.array(encoder.mean)) / np.array(encoder.std)
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1), atol=1e-5)


def test_picture_survives_a_stream(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("L", (8, 8), 9).save(sink, "PNG")
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "a.png").write_bytes(sink.getvalue())
    (image,) = images.arrays(read(str(tmp_path), config("data.image_size=8")).table)
    assert image.shape == (8, 8, 1)
    assert (image == 9).all()
