"""Which requests run, in which rows, and what they take over from each other."""

import random

import pytest

from serving.engines.places import SHORTEST_PREFIX, Copy, Places, common
from serving.engines.scheduler import Chunk, Scheduler


def test_a_prompt_is_read_in_chunks_beside_those_that_run() -> None:
    scheduler = Scheduler(slots=3, max_waiting=2, chunk=4)
    assert scheduler.submit("a", range(3))
    [first] = scheduler.next_step().prefill
    assert first == Chunk("a", 0, 0, 3, True)
    assert scheduler.submit("b", range(10)) and scheduler.submit("c", range(3))
    steps = [scheduler.next_step() for _ in range(4)]
    assert [s.decode for s in steps] == [("a",), ("a",), ("a",), ("a", "b", "c")]
    assert [s.prefill for s in steps] == [
        (Chunk("b", 1, 0, 4, False),),
        (Chunk("b", 1, 4, 4, False),),
        (Chunk("b", 1, 8, 2, True), Chunk("c", 2, 0, 3, True)),
        (),
    ]


def test_short_prompts_that_come_at_once_are_begun_together_within_bounds() -> None:
    scheduler = Scheduler(slots=9, max_waiting=0, chunk=4)
    scheduler.submit("a", range(3))
    scheduler.next_step()
    for name, length in (("b", 3), ("c", 9), ("d", 4), ("e", 4), ("f", 4), ("g", 4), ("h", 2)):
        assert scheduler.submit(name, range(length))
    read = [
        [(c.request, c.start, c.count) for c in scheduler.next_step().prefill] for _ in range(4)
    ]
    assert read == [
        [("b", 0, 3), ("c", 0, 4)],  # what is half read is the last
        [("c", 4, 4)],
        # 16 tokens at most, four chunks.
        [("c", 8, 1), ("d", 0, 4), ("e", 0, 4), ("f", 0, 4), ("g", 0, 3)],
        [("g", 3, 1), ("h", 0, 2)],
    ]


def test_an_aligned_prompt_is_cut_alike_whatever_runs() -> None:
    scheduler = Scheduler(slots=3, max_waiting=0, chunk=4, aligned=True)
    scheduler.submit("a", range(6))
    scheduler.submit("b", range(9))
    chunks = [chunk for _ in range(5) for chunk in scheduler.next_step().prefill]
    assert [(c.request, c.start, c.count) for c in chunks] == [
        ("a", 0, 4), ("a", 4, 2), ("b", 0, 4), ("b", 4, 4), ("b", 8, 1),
    ]  # fmt: skip


def test_nobody_waits_for_a_chunk_where_nobody_runs() -> None:
    scheduler = Scheduler(slots=4, max_waiting=0, chunk=4)
    assert all(scheduler.submit(name, range(20)) for name in "abc")
    assert [c.count for c in scheduler.next_step().prefill] == [20, 20, 20]


def test_one_prompt_a_step_where_prompts_are_read_whole() -> None:
    scheduler = Scheduler(slots=2, max_waiting=2)
    assert [scheduler.submit(name, range(900)) for name in "abcde"] == [True] * 4 + [False]
    assert scheduler.next_step().prefill == (Chunk("a", 0, 0, 900, True),)
    step = scheduler.next_step()
    assert (step.decode, step.prefill) == (("a",), (Chunk("b", 1, 0, 900, True),))
    assert scheduler.next_step().prefill == ()
    scheduler.remove("a")
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    step = scheduler.next_step()
    assert step.copies == (Copy(1, 0, 900),)
    assert (step.decode, step.prefill) == (("b",), (Chunk("c", 1, 0, 900, True),))


def test_the_queue_is_bounded_and_waiting_requests_can_be_given_up() -> None:
    scheduler = Scheduler(slots=1, max_waiting=1)
    assert scheduler.submit("a") and scheduler.submit("b")
    assert not scheduler.submit("c")
    scheduler.remove("b")
    scheduler.remove("never seen")
    assert scheduler.submit("d")
    assert (scheduler.running, scheduler.waiting) == (0, 2)


def test_a_shared_beginning_is_copied_from_who_runs_and_from_who_left() -> None:
    scheduler = Scheduler(slots=2, max_waiting=2, chunk=64, prefixes=1)
    shared = list(range(40))
    scheduler.submit("a", [*shared, 100])
    scheduler.next_step()
    scheduler.submit("b", [*shared, 200, 201])
    step = scheduler.next_step()
    assert step.copies == (Copy(0, 1, 40),)
    assert step.prefill == (Chunk("b", 1, 40, 2, True),) and scheduler.cached("b") == 40
    scheduler.remove("a")
    scheduler.remove("b")
    scheduler.submit("c", shared)
    step = scheduler.next_step()
    # Both are kept, one after the other, in the one spare row; the last token is always read.
    assert step.copies[-1] == Copy(2, 0, 39)
    assert step.prefill == (Chunk("c", 0, 39, 1, True),)
    scheduler.remove("c")
    scheduler.submit("d", shared, reuse=False)
    assert scheduler.next_step().prefill == (Chunk("d", 0, 0, 40, True),)


def test_prompts_that_begin_alike_are_read_once() -> None:
    scheduler = Scheduler(slots=4, max_waiting=0, chunk=64, prefixes=1)
    for name in "abc":
        scheduler.submit(name, range(100))
    assert [c.request for c in scheduler.next_step().prefill] == ["a"]
    step = scheduler.next_step()
    assert step.copies == (Copy(0, 1, 99), Copy(0, 2, 99))
    assert [(c.request, c.count) for c in step.prefill] == [("b", 1), ("c", 1)]


def test_short_beginnings_are_read_again() -> None:
    places = Places(2, 1)
    prompt = list(range(SHORTEST_PREFIX))
    assert places.take("a", prompt, reuse=True) is None
    places.hold("a", prompt)
    assert places.take("b", prompt, reuse=True) is None  # its last token would be left to read
    assert places.leave("b") == []


def test_the_prefix_longest_unused_makes_room() -> None:
    places = Places(1, 2)

    def visit(name: str, token: int) -> Copy | None:
        taken = places.take(name, [token] * 20, reuse=True)
        places.hold(name, [token] * (20 if taken is None else 20 - taken.tokens))
        places.leave(name)
        return taken

    assert visit("a", 1) is None and visit("b", 2) is None
    assert visit("c", 1) is not None
    assert visit("d", 3) is None  # in the place of 2
    assert visit("e", 1) is not None
    assert visit("f", 2) is None
    assert places.tokens == 40


def test_a_longer_text_takes_the_place_of_its_own_beginning() -> None:
    places = Places(1, 2)
    for name, length in (("a", 20), ("b", 30), ("c", 40)):
        taken = places.take(name, range(length), reuse=True)
        places.hold(name, range(0 if taken is None else taken.tokens, length))
        places.leave(name)
    assert places.tokens == 40


@pytest.mark.parametrize("length", [0, 1, 7, 64])
def test_the_shared_beginning_of_two_texts(length: int) -> None:
    shared = list(range(length))
    assert common([*shared, 1000, 5], [*shared, 2000]) == length
    assert common(shared, [*shared, 7]) == common(tuple(shared), shared) == length


class Rows:
    """A cache of tokens, which obeys copies and knows what every row really holds."""

    def __init__(self, count: int, length: int) -> None:
        self.rows = [[-1] * length for _ in range(count)]

    def copy(self, copy: Copy) -> None:
        self.rows[copy.target][: copy.tokens] = self.rows[copy.source][: copy.tokens]


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_every_row_holds_its_own_request(seed: int) -> None:
    rng = random.Random(seed)
    slots, prefixes = rng.randint(1, 5), rng.randint(0, 3)
    scheduler = Scheduler(slots, 8, chunk=rng.choice([3, 16]), prefixes=prefixes)
    cache, texts, alive = Rows(slots + prefixes, 400), {}, []
    for number in range(300):
        if rng.random() < 0.4:
            name, root = str(number), rng.choice([[1] * 40, [2] * 30, [1] * 20 + [3] * 30])
            texts[name] = [*root[: rng.randint(1, 50)], *rng.choices(range(9), k=rng.randint(1, 9))]
            if scheduler.submit(name, tuple(texts[name])):
                alive.append(name)
        if alive and rng.random() < 0.2:
            scheduler.remove(alive.pop(rng.randrange(len(alive))))
        step = scheduler.next_step()
        for copy in step.copies:
            cache.copy(copy)
        for row, name in enumerate(step.decode):
            text = texts[name]
            assert cache.rows[row][: len(text) - 1] == text[:-1] or len(text) == 0
            cache.rows[row][len(text) - 1] = text[-1]
            scheduler.places.hold(name, text[-1:])
            text.append(rng.randrange(9))
        for chunk in step.prefill:
            text = texts[chunk.request]
            assert cache.rows[chunk.row][: chunk.start] == text[: chunk.start]
            end = chunk.start + chunk.count
            cache.rows[chunk.row][chunk.start : end] = text[chunk.start : end]
            if chunk.last:
                text.append(rng.randrange(9))
        full = [n for n in alive if len(texts[n]) > 80]
        for name in full:
            alive.remove(name)
            scheduler.remove(name)
        assert scheduler.running <= slots and scheduler.running + scheduler.waiting == len(alive)
