"""The image family: examples, augmentation, learning, predictor."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import families
from pipelines.evaluation.trained import Trained
from pipelines.families.image_classifier import (
    LARGEST_SIDE,
    ImagePredictor,
    moved,
    normalised,
    read_input,
)
from tests import trained as made

FAMILY: Any = families.load("image_classifier")


def blob(size: int = 9) -> np.ndarray:
    image = np.zeros((size, size, 1), np.float32)
    image[1:3, 4] = 255.0
    return image


def test_a_shift_moves_down_and_right() -> None:
    image = blob()
    assert np.allclose(moved(image, 0, 2, 1)[3:5, 5, 0], 255)
    assert np.allclose(moved(image, 0, 0, 0), image)
    half = moved(image, 0, 0.5, 0)[:, 4, 0]
    assert half[1] == pytest.approx(127.5) and half[2] == pytest.approx(255, abs=0.1)


def test_a_quarter_turn_is_exact() -> None:
    image = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.float32)
    assert np.allclose(moved(image, 90, 0, 0), np.rot90(image, k=-1), atol=0.05)


def test_what_comes_into_view_continues_the_border() -> None:
    image = np.full((6, 5, 1), 40.0, np.float32)
    assert np.allclose(moved(image, 33, 4, -3), 40.0)


def test_normalising_puts_channels_first() -> None:
    pixels = np.zeros((4, 5, 3), np.float32)
    pixels[..., 1] = 255
    out = normalised(pixels, (0.0, 0.5, 0.5), (1.0, 0.25, 0.5))
    assert out.shape == (3, 4, 5) and out.dtype == np.float32 and out.flags.c_contiguous
    assert [out[c, 0, 0] for c in range(3)] == [0.0, 2.0, -1.0]


def example(config: Any, seed: int | None) -> np.ndarray:
    facts = {"channels": 1, "image_size": 12, "mean": [0.5], "std": [0.5]}
    pixels = np.random.default_rng(3).integers(0, 256, 144, dtype=np.uint8)
    rng = None if seed is None else np.random.default_rng(seed)
    values: np.ndarray = FAMILY.example(config, facts, {"pixels": pixels, "label": 1}, rng)[
        "pixel_values"
    ]
    return values


def test_augmentation_is_keyed_and_evaluation_has_none(tmp_path: Path) -> None:
    config = made.image_config(tmp_path)
    assert np.array_equal(example(config, 1), example(config, 1))
    assert not np.array_equal(example(config, 1), example(config, 2))
    assert np.array_equal(example(config, None), example(config, None))
    tree = config.data.model_copy(update={"shift": 0.0, "rotate": 0.0})
    still = config.model_copy(update={"data": tree})
    assert np.allclose(example(still, 1), example(config, None), atol=1e-5)
    for change in ({"shift": 0.0}, {"rotate": 0.0}):
        only = config.model_copy(update={"data": config.data.model_copy(update=change)})
        assert not np.allclose(example(only, 1), example(config, None))
        assert not np.allclose(example(only, 1), example(config, 1))


def test_the_loss_is_a_sum_over_the_batch(tmp_path: Path) -> None:
    config = made.image_config(tmp_path)
    corpus = made.corpus(config, made.pictures(20), made.pictures(6, seed=1))
    trained = Trained.open(made.checkpoint(config, corpus), config)
    model, batch = trained.model(), next(trained.batches())
    with torch.inference_mode():
        whole = FAMILY.loss(model, batch)
        parts = [
            FAMILY.loss(model, {k: v[i : i + 1] for k, v in batch.items()})
            for i in range(FAMILY.count(batch))
        ]
    assert FAMILY.count(batch) == 6 and whole.shape == ()
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-5)


def test_it_learns_and_its_published_folder_tells_left_from_right(tmp_path: Path) -> None:
    config = made.image_config(tmp_path)
    train = made.pictures(40)
    corpus = made.corpus(config, train, made.pictures(6, seed=1))
    trained = Trained.open(made.checkpoint(config, corpus), config)
    model = trained.untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [
        FAMILY.example(config, trained.corpus.facts, row, np.random.default_rng(i))
        for i, row in enumerate(trained.corpus.rows("train"))
    ]
    for _ in range(25):
        batch = FAMILY.collate(rows)
        optimizer.zero_grad()
        (FAMILY.loss(model, batch) / FAMILY.count(batch)).backward()
        optimizer.step()
    with corpus.local("encoder/") as folder:
        FAMILY.export(config, model.eval(), folder, tmp_path / "out")
    predictor = FAMILY.predictor(tmp_path / "out")
    images = made.pictures(8, seed=2)
    inputs = [
        {"pixels": np.frombuffer(raw, np.uint8).reshape(16, 16).tolist()}
        for raw in images.column("pixels").to_pylist()
    ]
    answers = predictor.predict(inputs)
    assert [a["label"] for a in answers] == images.column("label").to_pylist()
    for answer in answers:
        assert answer["score"] == max(answer["scores"].values())
        assert set(answer["scores"]) == {"零", "one"}
    # The same picture as a file, and among others, answers the same.
    (alone,) = predictor.predict([{"image": encoded(inputs[3]["pixels"])}])
    assert alone["score"] == pytest.approx(answers[3]["score"], abs=1e-5)
    assert predictor.predict([]) == []


def test_a_batch_answers_as_the_transformers_processor_prepares(tmp_path: Path) -> None:
    """What we feed the model is what `AutoImageProcessor` of the same folder makes."""
    from transformers import AutoImageProcessor

    config = made.image_config(tmp_path)
    corpus = made.corpus(config, made.pictures(10), made.pictures(4))
    model = Trained.open(made.checkpoint(config, corpus), config).model()
    with corpus.local("encoder/") as folder:
        FAMILY.export(config, model, folder, tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 1), dtype=np.uint8)
    ours = ImagePredictor(model, tmp_path / "out")._prepared(0, {"pixels": pixels[..., 0].tolist()})
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs = processor(pixels, return_tensors="np", input_data_format="channels_last")
    assert np.allclose(ours, theirs["pixel_values"][0], atol=1e-4)


def encoded(pixels: Any, kind: str = "PNG", **options: Any) -> str:
    raw = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(raw, kind, **options)
    return base64.b64encode(raw.getvalue()).decode()


def test_inputs_of_every_shape_are_read() -> None:
    colour = np.zeros((5, 7, 3), np.uint8)
    assert read_input({"image": encoded(colour)}).shape == (5, 7, 3)
    assert read_input({"image": encoded(colour, "JPEG")}).shape == (5, 7, 3)
    assert read_input({"image": encoded(colour[..., 0])}).shape == (5, 7, 1)
    address = "data:image/png;base64," + encoded(colour)
    assert read_input({"image": address}).shape == (5, 7, 3)
    assert read_input({"pixels": colour.tolist()}).shape == (5, 7, 3)
    assert read_input({"pixels": [[0, 255.0], [1, 2]]})[..., 0].tolist() == [[0, 255], [1, 2]]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "expected"),
        ({}, "expected"),
        ({"image": "x", "pixels": []}, "expected"),
        ({"image": 7}, "base64 string"),
        ({"image": "no base64!"}, "not base64"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, "not a whole PNG or JPEG"),
        ({"image": encoded(np.zeros((9, 9)))[:60]}, "cannot be read|not base64"),
        ({"pixels": []}, "rows of one length"),
        ({"pixels": [[]]}, "rows of one length"),
        ({"pixels": "12"}, "rows of one length"),
        ({"pixels": [[1, 2], [3]]}, "rows of one length"),
        ({"pixels": [[1, 256]]}, "0 to 255"),
        ({"pixels": [[-1, 2]]}, "0 to 255"),
        ({"pixels": [[float("nan"), 2]]}, "0 to 255"),
        ({"pixels": [["1", 2]]}, "0 to 255"),
        ({"pixels": [[10**30, 2]]}, "0 to 255"),
        ({"pixels": [[[1, 2], [3, 4]]]}, "red, green, blue"),
        ({"pixels": [[0] * (LARGEST_SIDE + 1)]}, "at most 4096 a side"),
    ],
)
def test_what_is_no_image_is_refused_with_its_place(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_input(value)


@pytest.mark.parametrize("side", [LARGEST_SIDE + 1, 20_000])
def test_a_small_file_that_unfolds_to_a_large_picture_is_refused(side: int) -> None:
    raw = io.BytesIO()
    Image.new("1", (side, side)).save(raw, "PNG")
    assert len(raw.getvalue()) < 60_000
    with pytest.raises(ValueError, match="at most 4096|exceeds limit"):
        read_input({"image": base64.b64encode(raw.getvalue()).decode()})


def test_the_refused_input_is_named(tmp_path: Path) -> None:
    config = made.image_config(tmp_path)
    corpus = made.corpus(config, made.pictures(10), made.pictures(4))
    model = Trained.open(made.checkpoint(config, corpus), config).model()
    with corpus.local("encoder/") as folder:
        predictor = ImagePredictor(model, folder)
    with pytest.raises(ValueError, match="input 1: "):
        predictor.predict([{"pixels": [[0]]}, {"pixels": 3}])
