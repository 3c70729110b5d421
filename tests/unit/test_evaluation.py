"""Measuring: bits per byte, compressors, samples, confusion, figures."""

import gzip
import lzma
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ArtifactError, UsageError
from cluster.placement import Room, roomiest, within
from pipelines import evaluate
from pipelines.evaluation import classification, language, plots
from pipelines.evaluation.trained import Trained
from pipelines.families.base import EvaluationJob
from tests import trained as made


def silent(done: int) -> None:
    pass


def opened(root: Path, **sections: object) -> Trained:
    config = made.text_config(root, **sections)
    return Trained.open(made.checkpoint(config, made.text_corpus(config)), config)


def measured(subject: Trained, folder: Path) -> language.Measured:
    from transformers import AutoTokenizer

    spelling = language.Spelling.of(AutoTokenizer.from_pretrained(folder))
    family: Any = subject.family
    return language.measure(job(subject, folder), spelling, family.loss, family.count)


def job(subject: Trained, folder: Path) -> EvaluationJob:
    return EvaluationJob(
        subject.config,
        subject.corpus.facts,
        subject.model(),
        subject.untrained,
        subject.batches,
        folder,
        subject.corpus.bytes("heldout"),
    )


def test_the_bytes_that_are_predicted_are_the_documents(tmp_path: Path) -> None:
    subject = opened(tmp_path)
    with subject.corpus.artifact.local("encoder/") as folder:
        found = measured(subject, folder)
    assert found.text == "".join(made.HELDOUT).encode()
    assert len(found.text) == subject.corpus.bytes("heldout")


def test_a_cut_inside_of_a_character_loses_no_byte(tmp_path: Path) -> None:
    """With one byte per token, some row ends inside of a Chinese character."""
    whole = "".join(made.HELDOUT).encode()
    config = made.text_config(tmp_path)
    tree = config.data.model_copy(update={"vocab_size": 257})
    config = config.model_copy(update={"data": tree})
    corpus = made.text_corpus(config)
    checkpoint = made.checkpoint(config, corpus)
    torn = 0
    with corpus.local("encoder/") as folder:
        for rows in range(1, 7):
            section = config.evaluate.model_copy(update={"max_rows": rows})
            subject = Trained.open(checkpoint, config.model_copy(update={"evaluate": section}))
            text = measured(subject, folder).text
            assert whole.startswith(text) and len(text) == found_tokens(rows, whole)
            torn += not decodes(text)
    assert torn


def found_tokens(rows: int, whole: bytes) -> int:
    """Predicted bytes of the first rows: one per token, less the end-of-text tokens between."""
    tokens = min(32 * rows, len(whole) + 2)
    first = len(made.HELDOUT[0].encode())
    return tokens - (tokens > first) - (tokens == len(whole) + 2)


def decodes(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_model_without_knowledge_needs_the_logarithm_of_the_vocabulary(tmp_path: Path) -> None:
    config = made.text_config(tmp_path)
    corpus = made.text_corpus(config)
    torch.manual_seed(0)
    from pipelines import families

    model = families.load("causal_lm").build_model(config, corpus.manifest.detail["facts"])
    flat = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    subject = Trained.open(made.checkpoint(config, corpus, flat), config)
    with corpus.local("encoder/") as folder:
        found = measured(subject, folder)
    vocabulary = subject.corpus.facts["vocab_size"]
    assert found.loss == pytest.approx(math.log(vocabulary), rel=1e-5)
    expected = math.log2(vocabulary) * found.predictions / len(found.text)
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_the_report_of_a_language_model(tmp_path: Path) -> None:
    subject = opened(tmp_path)
    ticks: list[int] = []
    report = evaluate.measure(subject, "cpu", ticks.append)
    text = "".join(made.HELDOUT).encode()
    assert report.metrics["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert report.metrics["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert report.headline == f"{report.metrics['bits_per_byte']:.3f} bits per byte"
    for part in ("gzip -9", "xz -9", "Before training", "sample 3 of 3", f"all {len(text)} held"):
        assert part in report.text
    assert ticks[-1] == subject.heldout_rows and ticks == sorted(ticks)
    assert size_of(report.figures["curves"]) > (600, 300)


def test_a_cut_split_is_said_and_measured_alone(tmp_path: Path) -> None:
    section = {"max_rows": 2, "sample_tokens": 4, "prompt": "def "}
    subject = opened(tmp_path, evaluate=section)
    report = evaluate.measure(subject, "cpu", silent)
    whole = subject.corpus.bytes("heldout")
    assert 0 < report.metrics["measured_bytes"] < whole
    assert f"the first {int(report.metrics['measured_bytes'])} of {whole} held-out" in report.text


def test_samples_are_the_same_for_the_same_seed_and_fit_the_context(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    subject = opened(tmp_path, evaluate={"prompt": "x = 1\n" * 80, "sample_tokens": 500})
    with subject.corpus.artifact.local("encoder/") as folder:
        task = job(subject, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        first = language.continuations(task, task.model, tokenizer, 3)
        again = language.continuations(task, task.model, tokenizer, 3)
        text = language.evaluate(task, loss=subject.family.loss, count=subject.family.count).text
    assert first == again and len(first) == 3
    assert "evaluate.sample_tokens is 500, the context is full" in text


def test_samples_cannot_leave_their_block_or_drive_the_terminal() -> None:
    shown = language.fenced("a```\n\x1b[31mred\u202e\tb 定")
    assert shown == "````\na```\n\ufffd[31mred\ufffd\tb 定\n````"


def test_every_byte_has_a_spelling() -> None:
    from tokenizers import pre_tokenizers

    letters = language._letters()
    assert sorted(letters.values()) == list(range(256))
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    # ByteLevel itself says which letters a text is written in.
    written = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é 定\n")
    assert b"".join(language._token_bytes(part) for part, _ in written) == "é 定\n".encode()


def test_the_untrained_model_is_the_one_that_training_starts_from(tmp_path: Path) -> None:
    subject = opened(tmp_path)
    torch.manual_seed(subject.config.seed)
    start = subject.family.build_model(subject.config, subject.corpus.facts).state_dict()
    torch.manual_seed(5)
    for name, value in subject.untrained().state_dict().items():
        assert torch.equal(value, start[name])
    assert any(
        not torch.equal(value, start[name]) for name, value in subject.model().state_dict().items()
    )


def test_the_architecture_is_the_checkpoints_and_the_measure_the_callers(tmp_path: Path) -> None:
    config = made.text_config(tmp_path)
    checkpoint = made.checkpoint(config, made.text_corpus(config))
    wider = config.model.model_copy(update={"hidden_size": 64})
    fewer = config.evaluate.model_copy(update={"max_rows": 1})
    other = config.model_copy(update={"model": wider, "evaluate": fewer})
    subject = Trained.open(checkpoint, other)
    assert subject.config.model == config.model and subject.heldout_rows == 1
    subject.model()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    config = made.text_config(tmp_path)
    checkpoint = made.checkpoint(config, made.text_corpus(config), {"stray": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="does not fit its config"):
        Trained.open(checkpoint, config).model()


def test_a_corpus_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    config = made.image_config(tmp_path)
    empty = made.corpus(config, made.pictures(10), made.pictures(2))
    detail = empty.manifest.detail
    detail["splits"]["heldout"]["files"] = []
    staging = empty.store.stage("corpus", config.name)
    bare = staging.commit([], fingerprint="f", config=empty.manifest.config, detail=detail)
    made.checkpoint(config, bare)
    with pytest.raises(UsageError, match=r"raise data\.heldout_fraction"):
        evaluate.run(config)


def test_the_report_of_a_classifier(tmp_path: Path) -> None:
    config = made.image_config(tmp_path)
    corpus = made.corpus(config, made.pictures(20), made.pictures(11, seed=1))
    subject = Trained.open(made.checkpoint(config, corpus), config)
    report = evaluate.measure(subject, "cpu", silent)
    logits = []
    with torch.inference_mode():
        for batch in subject.batches():
            answer = subject.model()(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            logits.append((answer == batch["labels"]).float())
    assert report.metrics["accuracy"] == pytest.approx(float(torch.cat(logits).mean()))
    assert report.metrics["measured_examples"] == 11
    assert report.headline == f"accuracy {report.metrics['accuracy']:.3f}"
    assert {"curves", "confusion"} == set(report.figures) and "零" in report.text


def test_recall_per_class() -> None:
    found = classification.Measured(6.0, np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]))
    assert found.accuracy == 5 / 6
    assert found.recalls[:2].tolist() == [0.75, 1.0] and math.isnan(found.recalls[2])


def test_the_running_mean_stays_on_its_curve() -> None:
    values = np.array([4.0, 2.0, 0.0, 6.0])
    assert plots.smoothed(values, share=0.5).tolist() == [3.0, 2.0, 8 / 3, 3.0]
    assert plots.smoothed(values[:1]).tolist() == [4.0]
    line = np.arange(100.0)
    assert np.allclose(plots.smoothed(line)[5:-5], line[5:-5])


def test_a_run_is_drawn_with_what_it_has() -> None:
    from matplotlib.figure import Figure

    rows = [{"step": float(n), "loss": 1.0 / n, "data_wait": 0.1} for n in range(1, 9)]
    rows[3]["loss"] = float("nan")  # skipped
    figure = Figure()
    plots.training(rows)(figure)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in shown] == ["loss, nats", "share waiting for data"]
    assert [len(axes.lines[0].get_xdata()) for axes in shown] == [7, 8]
    assert size_of(plots.png(plots.training(rows))) > (600, 300)


def test_labels_that_the_font_lacks_become_numbers() -> None:
    assert plots.drawable(["0", "naïve", "Ωμ"]) and not plots.drawable(["0", "定日镜"])
    assert plots.png(plots.confusion(np.array([[2, 1], [0, 3]]), ["定", "日"]))


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_work_goes_to_the_largest_node_or_a_gpu() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}, {"GPU": 1.0}]
    assert roomiest(nodes, gpu=False) == Room(8, 0)
    assert roomiest(nodes, gpu=True) == Room(1, 1)
    assert roomiest(nodes[:2], gpu=True) == Room(8, 0)


def test_what_others_hold_is_not_waited_for() -> None:
    assert within(Room(8, 0), {"CPU": 3.5}) == Room(3, 0)
    assert within(Room(8, 0), {}) == Room(1, 0)
    assert within(Room(1, 1), {"CPU": 9.0, "GPU": 1.0}) == Room(1, 1)
    assert within(Room(1, 1), {"CPU": 9.0}).device == "cpu"
