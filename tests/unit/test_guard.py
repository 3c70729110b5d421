from dataclasses import replace

import pytest

from cluster.config import TrainSection
from cluster.telemetry import Board, Row, Sign
from pipelines.training import guard, zero
from pipelines.training.engine import is_fault


def section(**changes: object) -> TrainSection:
    return TrainSection.model_validate(changes)


def rows(losses: list[float], **marks: list[int]) -> list[Row]:
    history: list[Row] = []
    for number, loss in enumerate(losses):
        row = {"step": number + 1.0, "batch": float(number), "loss": loss, "skipped": 0.0}
        row |= {mark: float(number in where) for mark, where in marks.items()}
        history.append(row)
        row["spike"] = float(guard.spikes(section(), history))
    return history


def usual(count: int) -> list[float]:
    """A loss that falls slowly and jitters a little."""
    return [3.0 - 0.01 * n + 0.05 * (n % 3) for n in range(count)]


# --- not finite


def test_a_skipped_step_is_told_and_passed_over() -> None:
    history = rows([*usual(30), float("nan")], skipped=[30])
    assert guard.judge(section(), history) == guard.Verdict("go", "skipped_step")


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_as_many_skipped_steps_in_a_row_as_are_allowed_stop_the_run(most: int) -> None:
    for count in range(1, most + 1):
        where = list(range(30, 30 + count))
        history = rows([*usual(30), *[float("nan")] * count], skipped=where)
        verdict = guard.judge(section(max_skipped=most), history)
        assert verdict.action == ("stop" if count == most else "go")
    assert f"{most} steps in a row" in verdict.reason


def test_a_good_step_between_two_skipped_ones_starts_the_count_anew() -> None:
    losses = [*usual(30), float("nan"), float("nan"), 2.7, float("nan")]
    history = rows(losses, skipped=[30, 31, 33])
    assert guard.judge(section(), history).action == "go"


# --- leaps


def judged(losses: list[float], **settings: object) -> list[guard.Verdict]:
    history = rows(losses)
    return [guard.judge(section(**settings), history[: n + 1]) for n in range(len(history))]


@pytest.mark.parametrize(
    ("policy", "action"), [("continue", "go"), ("stop", "stop"), ("rewind", "rewind")]
)
def test_a_leap_is_found_once_and_answered_as_configured(policy: str, action: str) -> None:
    verdicts = judged([*usual(60), 9.0, 9.0, 9.0, *usual(10)], on_spike=policy)
    told = [(n, verdict) for n, verdict in enumerate(verdicts) if verdict.event]
    assert [(n, v.event, v.action) for n, v in told] == [(61, "loss_spike", action)]


def test_one_high_loss_is_no_leap() -> None:
    assert all(not v.event for v in judged([*usual(60), 9.0, *usual(20), 9.0, *usual(5)]))


def test_no_false_alarm_in_falling_flat_and_noisy_runs() -> None:
    falling = [10 * 0.97**n for n in range(300)]
    flat = [2.0 + 0.001 * (n % 2) for n in range(300)]
    rising_slowly = [2.0 + 0.002 * n for n in range(300)]
    for losses in (falling, flat, rising_slowly, usual(200)):
        assert all(not verdict.event for verdict in judged(losses))


def test_zero_deviations_switches_the_search_off() -> None:
    history = rows([*usual(60), 90.0, 90.0])
    assert guard.spikes(section(), history)
    assert not guard.spikes(section(spike_deviations=0.0), history)


def test_a_resumed_run_judges_as_the_undisturbed_one() -> None:
    losses = [*usual(150), 9.0, 9.0, *usual(20)]
    whole = rows(losses)
    for cut in (100, 150, 151, 152):
        resumed = [dict(row) for row in whole[:cut]]
        for row in whole[cut:]:
            resumed.append({k: v for k, v in row.items() if k != "spike"})
            resumed[-1]["spike"] = float(guard.spikes(section(), resumed))
            at = len(resumed)
            assert guard.judge(section(), resumed) == guard.judge(section(), whole[:at])


def test_batches_left_out_follow_from_the_history() -> None:
    assert guard.shift([]) == 0
    assert guard.shift(rows(usual(10))) == 0
    assert guard.shift([{"step": 21.0, "batch": 45.0}]) == 25
    assert guard.shift([{"step": 7.0, "loss": 1.0}]) == 0


# --- signs of life

SIGN = Sign(
    start_id="a",
    rank=0,
    ranks=3,
    pid=1,
    born=0.0,
    node="n",
    start=10,
    step=50,
    phase="step",
    batch=50,
    step_seconds=1.0,
    longest=2.0,
    own=0.0,
)


def signs(*changes: dict[str, object]) -> list[Sign]:
    return [replace(SIGN, rank=rank, **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]


def seen(all_signs: list[Sign], ages: list[float], still: list[float] | None = None) -> list:
    return list(zip(all_signs, ages, still or ages, strict=True))


def test_the_silent_rank_is_the_hung_one_however_many_wait_for_it() -> None:
    found = guard.hung(seen(signs({}, {}, {}), [1, 26, 1], [26, 26, 26]), 25)
    assert [sign.rank for sign in found] == [1]


def test_a_silence_of_all_is_given_more_time() -> None:
    together = signs({}, {}, {})
    assert guard.hung(seen(together, [40, 41, 42]), 25) == []
    assert [sign.rank for sign in guard.hung(seen(together, [76, 78, 77]), 25)] == [1, 2, 0]
    alone = [replace(SIGN, ranks=1)]
    assert guard.hung(seen(alone, [26]), 25) == alone


def test_nobody_is_hung_while_signs_come_and_steps_go_by() -> None:
    assert guard.hung(seen(signs({}, {}, {}), [1, 2, 24], [1, 2, 24]), 25) == []


def test_where_all_give_signs_the_one_that_is_behind_holds_the_group_up() -> None:
    stuck = signs({}, {"phase": "data"}, {})
    assert [s.rank for s in guard.hung(seen(stuck, [1, 1, 1], [40, 40, 40]), 25)] == [1]
    late = signs({"step": 51, "phase": "data"}, {}, {"step": 51, "phase": "data"})
    assert [s.rank for s in guard.hung(seen(late, [1, 1, 1], [40, 40, 40]), 25)] == [1]


def test_long_steps_are_no_standstill() -> None:
    slow = signs({"longest": 60.0}, {"longest": 60.0}, {"longest": 60.0})
    assert guard.hung(seen(slow, [1, 1, 1], [400, 400, 400]), 25) == []
    assert guard.hung(seen(slow, [1, 1, 1], [601, 601, 601]), 25)


def test_start_up_and_checkpoints_are_no_standstill() -> None:
    starting = signs({"step": 10}, {"step": 10}, {"step": 10})
    assert guard.hung(seen(starting, [99, 1, 1]), 25) == []
    soon = signs({"step": 10}, {}, {})  # it went silent before it could tell of its first step
    assert [sign.rank for sign in guard.hung(seen(soon, [99, 1, 1]), 25)] == [0]
    assert guard.hung(seen(signs({}, {})[:2], [99, 99]), 25) == []  # the third is still to come
    saving = signs({"phase": "save"}, {}, {})
    assert guard.hung(seen(saving, [1, 1, 1], [500, 500, 500]), 25) == []
    silent = guard.hung(seen(saving, [30, 1, 1], [500, 500, 500]), 25)
    assert [sign.rank for sign in silent] == [0]


def test_the_board_hears_the_newest_start_only_and_passes_the_wish_to_stop_on() -> None:
    now = [100.0]
    board = Board(clock=lambda: now[0])
    board.begin("a")
    assert board.sign(SIGN) is False
    now[0] += 3
    assert [(age, still) for _, age, still in board.signs()] == [(3, 3)]
    board.sign(SIGN)
    assert [(age, still) for _, age, still in board.signs()] == [(0, 3)]
    board.sign(replace(SIGN, step=51))
    assert [(age, still) for _, age, still in board.signs()] == [(0, 0)]
    board.begin("b")
    board.stop()
    assert board.sign(SIGN) is True and board.signs() == []


def test_a_slow_rank_is_named_and_an_idle_difference_is_not() -> None:
    own = [{"own": 0.3}, {"own": 0.7}, {"own": 0.3}]
    assert (found := guard.slow(signs(*own))) is not None and found.rank == 1
    assert guard.slow(signs({"own": 0.3}, {"own": 0.59}, {"own": 0.3})) is None
    assert guard.slow(signs({"own": 0.01}, {"own": 0.1}, {"own": 0.01})) is None
    assert guard.slow(signs({"own": 0.3}, {"own": 0.9}, {"own": 0.0})) is None
    assert guard.slow(signs({"own": 0.9})) is None


# --- crash loops


def test_three_deaths_in_one_step_are_a_crash_loop_and_progress_is_none() -> None:
    bad = guard.Death(10, 17, "ValueError: no")
    assert guard.crash_loop([bad, bad]) == ""
    assert "3 times in a row in step 18: ValueError: no" in guard.crash_loop([bad, bad, bad])
    assert guard.crash_loop([bad, bad, replace(bad, step=19)]) == ""
    assert guard.crash_loop([replace(bad, start=0), bad, bad]), "a commit between changes nothing"
    killed = guard.Death(10, 17, "")
    assert "killed" in guard.crash_loop([killed] * 3)
    assert guard.crash_loop([guard.Death(10, 10, "")] * 3) == ""


def test_a_death_is_told_by_its_cause_not_by_those_who_died_of_it() -> None:
    last = signs({"step": 17}, {"step": 18}, {"step": 17})
    peer = "RuntimeError: [gloo] Connection closed by peer"
    assert guard.death(last, [peer, "KeyError: 7"]) == guard.Death(10, 18, "KeyError: 7")
    assert guard.death(last, [peer]) == guard.Death(10, 18, "")
    assert guard.death([], [peer]) is None


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16", "fp16"])
def test_only_the_loss_scale_of_fp16_may_overflow(precision: zero.Precision) -> None:
    assert is_fault(precision, float("nan")) and is_fault(precision, float("inf"))
    assert is_fault(precision, 2.5) == (precision != "fp16")
