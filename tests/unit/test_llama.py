"""The fast path against the models' own code, and the ways to hold weights."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CapacityError
from serving.engines import linear, loading
from serving.engines.fast import FastRunner
from serving.engines.linear import SAME, Both, Int8, Packed, Pieces, Plain, converted
from serving.engines.llama import Shape, fits
from serving.engines.loading import Options, choose_kind, open_runner
from serving.engines.runner import Feed
from tests import tiny_model
from tests.engines import need

SIZE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def config(kind: str, **more: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}Config")(**(SIZE | more))


CONFIGS = {
    "llama": lambda: config("Llama"),
    "biases": lambda: config("Llama", attention_bias=True, mlp_bias=True),
    "wide heads": lambda: config("Llama", head_dim=16),
    "tied": lambda: config("Llama", tie_word_embeddings=True),
    "llama3 rope": lambda: config(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda: config("Mistral", sliding_window=None),
    "qwen2": lambda: config("Qwen2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model.write(path)
    return path


def runner_of(model: Any, folder: Path, kind: Any = Plain, precision: Any = "fp32") -> FastRunner:
    return FastRunner(model, folder, slots=2, length=128, spare=0, kind=kind, precision=precision)


def logits_of(runner: FastRunner, ids: list[int]) -> torch.Tensor:
    """In two chunks, beside another request that decodes."""
    runner.forward([], [Feed(0, 0, [1, 2], 0)])
    first = runner.forward([Feed(0, 2, [3], 1)], [Feed(1, 0, ids[:20], 20)])[1:]
    rest = runner.forward([Feed(0, 3, [4], 1)], [Feed(1, 20, ids[20:-1], len(ids) - 21)])[1:]
    last = runner.forward([Feed(0, 4, [5], 1), Feed(1, len(ids) - 1, ids[-1:], 1)], [])[1:]
    return torch.cat([first, rest, last])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", [Plain, Packed, Pieces, Both])
def test_logits_are_those_of_the_models_own_code(name: str, kind: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are 0 and norm weights 1 at the start
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert fits(model.config)
    ids = torch.randint(0, 256, (50,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    found = logits_of(runner_of(model, folder, kind), ids)
    assert float((found - expected).abs().max() / expected.std()) < 2e-5


@pytest.mark.parametrize(
    "unfit",
    [
        lambda: config("Mistral", sliding_window=16),
        lambda: config("Llama", hidden_act="gelu"),
        lambda: config(
            "Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        lambda: config("Qwen3"),
        lambda: config("Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0),
    ],
)  # fmt: skip
def test_what_this_code_does_not_compute_is_left_to_the_models_own(unfit: Any) -> None:
    assert not fits(unfit())


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (Plain, "fp32"),
        (Packed, "fp32"),
        (Pieces, "fp32"),
        (Both, "fp32"),
        (Plain, "bf16"),
        (Packed, "bf16"),
        (Int8, "int8"),
    ],
)
@pytest.mark.parametrize("rows", [1, 5])
def test_products_and_what_is_fused_with_them_are_right(
    kind: Any, precision: Any, rows: int
) -> None:
    need(kind, precision)
    torch.manual_seed(0)
    x, other = torch.randn(rows, 48), torch.randn(rows, 80)
    weight, up, bias = torch.randn(80, 48), torch.randn(80, 48), torch.randn(80)
    held = bias.bfloat16() if precision == "bf16" else bias
    with torch.inference_mode():
        one = kind(converted(weight, precision), held)
        both = kind.gated((converted(weight, precision), held), (converted(up, precision), None))
        exact = x @ weight.T + bias
        gated = torch.nn.functional.silu(exact) * (x @ up.T)
        for found, expected in (
            (one(x), exact),
            (one.plus(x, other), exact + other),
            (both(x), gated),
        ):
            apart = (found.float() - expected).abs().max() / expected.abs().max()
            assert float(apart) < SAME[precision]
        assert one(x).dtype == one.plus(x, other).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "precision"), [(Plain, "fp32"), (Packed, "fp32"), (Packed, "bf16"), (Int8, "int8")]
)
def test_a_reply_does_not_depend_on_its_neighbours(kind: Any, precision: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    need(kind, precision)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quiet, loud = (runner_of(model, folder, kind, precision) for _ in range(2))
    for runner, others in ((quiet, [1, 1, 1]), (loud, [200, 9, 77])):
        runner.forward([], [Feed(0, 0, [5, 6, 7], 0), Feed(1, 0, others, 0)])
    for step in range(5):
        rows = [
            runner.forward([Feed(0, 3 + step, [8], 1), Feed(1, 3 + step, [token], 1)], [])[0]
            for runner, token in ((quiet, 1), (loud, 250))
        ]
        assert torch.equal(*rows)


@pytest.mark.parametrize(("kind", "precision"), [(Packed, "fp32"), (Int8, "int8")])
def test_nor_does_it_depend_on_how_long_they_are(kind: Any, precision: Any, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for length in (3, 40, 100):  # each makes attention cover more places
        runner = runner_of(model, folder, kind, precision)
        runner.forward([], [Feed(0, 0, [5, 6, 7], 0), Feed(1, 0, list(range(length)), 0)])
        found.append(runner.forward([Feed(0, 3, [8], 1), Feed(1, length, [9], 1)], [])[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_in_constant_shape_rounding_does_not_depend_on_company(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(range(40, 62))

    def rows(company: bool) -> torch.Tensor:
        runner = FastRunner(
            model, folder, slots=3, length=128, spare=0, kind=Packed, precision="fp32",
            constant=True,
        )  # fmt: skip
        other = [Feed(0, 0, list(range(90)), 0)] if company else []
        if other:
            runner.forward([], other)
        at = len(other)
        found = [runner.forward([], [Feed(at, 0, ids, 1)])]
        for step in range(6):
            beside = [Feed(0, 90 + step, [7], 1)] if company else []
            half_read = [Feed(at + 1, 4 * step, [1, 2, 3, 4], 0)] if company else []
            decode = [*beside, Feed(at, len(ids) + step, [step], 1)]
            found.append(runner.forward(decode, half_read)[len(beside) :])
        return torch.cat(found)

    assert torch.equal(rows(company=False), rows(company=True))


def test_the_weights_are_held_by_what_is_right_and_fast_here(folder: Path) -> None:
    shape = Shape(2, 4, 4, 64, 256, 700, 1e-5, 512)
    assert choose_kind(shape, "fp32", twice=True)[0] == "fp32"
    assert choose_kind(shape, "fp32", twice=False)[1] is not Both
    assert choose_kind(shape, "bf16", twice=True)[0] in ("bf16", "fp32")
    with pytest.raises(ValueError, match="fp64"):
        open_runner(folder, 128, Options(slots=1, precision="fp64"))  # type: ignore[arg-type]


def test_a_constant_shape_does_not_depend_on_what_was_timed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas would round differently, and the same seed give another text."""
    monkeypatch.setattr(loading, "seconds", None)
    runner = open_runner(folder, 128, Options(slots=1, constant_shape=True))
    assert isinstance(runner, FastRunner) and runner.constant


def test_the_ways_are_timed_on_one_thread_and_in_turns() -> None:
    """On two, a process that takes a core now and then had the slower way chosen for good."""
    threads, order = torch.get_num_threads(), []

    def way(name: str, rest: float) -> Any:
        def product(x: torch.Tensor) -> torch.Tensor:
            order.append((name, len(x), torch.get_num_threads()))
            time.sleep(rest)
            return x

        return product

    with linear.one_thread():
        slow, fast = linear.seconds([way("slow", 0.004), way("fast", 0.0)], 8)
    assert all(one > other for one, other in zip(slow, fast, strict=True))
    assert [name for name, _, _ in order[:4]] == ["slow", "fast", "slow", "fast"]
    assert {rows for _, rows, _ in order} == set(linear.PROBED_ROWS)
    assert {count for _, _, count in order} == {1}
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("threads", "outputs", "count", "width"),
    [
        (1, 384, 3, 128),
        (2, 384, 4, 96),  # as many for each thread
        (3, 384, 3, 128),
        (16, 384, 16, 24),
        (2, 250, 2, 128),  # padded
    ],
)
def test_pieces_give_each_thread_as_many(
    threads: int, outputs: int, count: int, width: int
) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        torch.set_num_threads(threads)
        gate, up = ((torch.randn(outputs, 8), torch.randn(outputs)) for _ in range(2))
        for kind in (Pieces, Both):
            linear, gated = kind(*gate), kind.gated(gate, up)
            for rows in (1, 3):
                x, other = torch.randn(rows, 8), torch.randn(rows, outputs)
                one = torch.nn.functional.linear(x, *gate)
                two = torch.nn.functional.linear(x, *up)
                torch.testing.assert_close(linear(x), one)
                torch.testing.assert_close(linear.plus(x, other), one + other)
                torch.testing.assert_close(gated(x), torch.nn.functional.silu(one) * two)
        assert Pieces(*gate).split.weight.shape == (count, 8, width)
        assert Both(*gate).single.split.weight.shape[0] == threads
    finally:
        torch.set_num_threads(before)


def test_between_equals_the_usual_way_is_taken() -> None:
    equal = [1.0, 2.0, 4.0]
    assert min(linear.RELUCTANCE, key=lambda kind: linear.cost(kind, equal)) is Packed
    assert linear.cost(Both, [0.95, 2.0, 4.0]) > linear.cost(Packed, equal)
    assert linear.cost(Both, [0.85, 2.0, 4.0]) < linear.cost(Packed, equal)
    assert linear.cost(Pieces, [0.95, 1.9, 3.8]) > linear.cost(Packed, equal)
    assert linear.cost(Pieces, [0.85, 1.7, 3.4]) < linear.cost(Packed, equal)


@pytest.mark.parametrize(
    ("kind", "precision"), [(Plain, "bf16"), (Pieces, "fp32"), (Both, "fp32"), (Int8, "int8")]
)
def test_the_compiled_pass_is_the_one_that_stands_there(
    kind: Any, precision: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    compiled = runner_of(model, folder, kind, precision)
    assert isinstance(compiled._step._pass, torch.jit.ScriptModule)

    def gone(module: Any) -> Any:
        raise AttributeError("no attribute 'script'")

    monkeypatch.setattr(torch.jit, "script", gone)
    plain = runner_of(model, folder, kind, precision)
    assert not isinstance(plain._step._pass, torch.jit.ScriptModule)
    ids = list(range(40, 75))
    assert torch.equal(logits_of(compiled, ids), logits_of(plain, ids))


def test_products_that_leave_sixteen_bits_rule_out_8_bit_weights() -> None:
    """As on CPUs that add products of 8 bits up in 16."""
    need(Int8, "int8")

    class Saturating(Int8):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(max=100)

    weight = torch.randn(64, 256) * 256**-0.5
    assert loading._checked(Int8, weight, "int8")
    assert not loading._checked(Saturating, weight, "int8")


@pytest.mark.parametrize(("precision", "kind"), [("int8", Int8), ("bf16", Packed)])
def test_a_lower_precision_that_is_no_faster_is_not_taken(
    precision: Any, kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need(kind, precision)
    shape = Shape(2, 4, 4, 64, 256, 700, 1e-5, 512)
    times = {"fp32": 2.0, precision: 1.0}

    def timed(ways: list[Any], inputs: int) -> list[list[float]]:
        # The lower precision is the last candidate.
        return [[times["fp32"]] * 3 for _ in ways[:-1]] + [[times[precision]] * 3]

    monkeypatch.setattr(loading, "seconds", timed)
    assert choose_kind(shape, precision, twice=False) == (precision, kind)
    assert not caplog.text
    times[precision] = 3.0
    assert choose_kind(shape, precision, twice=False)[0] == "fp32"
    assert f"{precision} is not faster than fp32 on this machine: fp32 it is" in caplog.text


def test_a_cache_that_cannot_fit_is_refused_with_the_cure(folder: Path) -> None:
    with pytest.raises(CapacityError, match=r"x 128 tokens takes .* lower serve.max_concurrent"):
        open_runner(folder, 128, Options(slots=10**9))


def test_the_cache_is_bounded_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = open_runner(folder, 128, Options(slots=3, prefixes=2, context=64))
    assert runner.context_length == 64
    assert "cache of 3 sequences and 2 prefixes x 64 tokens" in caplog.text
