import threading
import time

import pytest
import torch

from cluster import loading
from cluster.hardware import peak_flops
from pipelines import families
from pipelines.training.engine import StepOutcome
from pipelines.training.meter import (
    OWN_STEPS,
    Clock,
    OwnTime,
    Rates,
    peak_memory,
    peak_of,
    product_flops,
)
from pipelines.training.threads import compute_on

OUTCOME = StepOutcome(2.5, 1000, 0.7, False, 0.1, ())


def test_a_row_follows_from_predictions_seconds_and_peak() -> None:
    rates = Rates(devices=4, flops_per_prediction=6e9, peak_flops=1e12, began=time.time() - 100)
    row = rates.row(OUTCOME, seconds=2.0, waited=0.5, counted=80.0)
    assert row["predictions_per_second"] == 500
    assert row["predictions_per_second_per_device"] == 125
    assert row["mfu"] == pytest.approx(500 * 6e9 / 4e12)
    assert row["data_wait"] == 0.25
    assert row["goodput"] == pytest.approx(0.8, abs=0.01)
    assert (row["loss"], row["gradient_norm"], row["skipped"]) == (2.5, 0.7, 0.0)


def test_without_a_peak_there_is_no_utilisation() -> None:
    assert "mfu" not in Rates(1, 6e9, None, 0.0).row(OUTCOME, seconds=1, waited=0, counted=1)
    assert peak_of(torch.device("cpu")) is None


def test_peaks_go_by_the_name_that_the_driver_gives() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Tesla V100-SXM2-16GB") == 125e12
    assert peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("some card of tomorrow") is None


def test_flops_of_a_language_model_follow_its_weights() -> None:
    """Against the model itself: six per weight that multiplies, and attention's own."""
    config = loading.load("gpt-demo", ["model.kv_heads=1", "model.heads=4", "model.hidden_size=64"])
    family = families.load("causal_lm")
    facts = {"vocab_size": 512, "end_of_text": 0}
    model = family.build_model(config, facts)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # tied: counted once
    shape: object = config.model
    attention = 12 * shape.layers * 64 * config.data.sequence_length  # type: ignore[attr-defined,union-attr]
    assert family.flops_per_prediction(config, facts) == 6 * matrices + attention


def test_own_time_is_known_after_enough_steps_and_shrugs_outliers_off() -> None:
    own = OwnTime()
    for _ in range(OWN_STEPS - 1):
        own.add(0.5, 1.0)
    assert own.usual == 0.0
    own.add(90.0, 91.0)
    assert own.usual == 0.5 and own.longest == 91.0


def test_a_clock_leaves_out_what_it_is_told_to() -> None:
    clock = Clock()
    time.sleep(0.05)
    clock.restart()
    clock.data_is_there()
    assert clock.waited < 0.05 and clock.step_is_done() < 0.05


def test_memory_is_in_bytes() -> None:
    assert 1e7 < peak_memory(torch.device("cpu")) < 1e12


def test_threads_begun_later_compute_on_one() -> None:
    counts: dict[str, int] = {}

    def reduces() -> None:
        counts["later"] = torch.get_num_threads()

    def trains() -> None:
        compute_on(3)
        # A measure of the machine, which takes another number of threads, changes none of it.
        product_flops(2)
        later = threading.Thread(target=reduces)
        later.start()
        later.join()
        counts["own"] = torch.get_num_threads()

    worker = threading.Thread(target=trains)
    worker.start()
    worker.join()
    assert counts == {"own": 3, "later": 1}
