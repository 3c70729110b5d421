"""Which row of the cache holds whose tokens, and what can be taken over from whom. Pure.

Requests that run lie in rows 0 to n-1 without gaps, so that a step works on a view of the cache.
Behind the slots lie spare rows, which keep what finished requests have read: a prompt that begins
with the same tokens copies them instead of reading them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST_PREFIX = 16
"""Tokens from which on taking over is worth a copy."""


@dataclass(frozen=True)
class Copy:
    """Copy the first tokens of a row into another one."""

    source: int
    target: int
    tokens: int


class Places:
    """
    Args:
        slots: rows for requests that run.
        spare: rows behind them for prefixes.
    """

    def __init__(self, slots: int, spare: int = 0) -> None:
        self._slots = slots
        self.order: list[str] = []
        """Requests by row."""
        self._held: dict[str, list[int]] = {}
        self._spare: list[list[int]] = [[] for _ in range(spare)]
        self._used: list[int] = [0] * spare
        self._clock = 0

    @property
    def tokens(self) -> int:
        """That all rows together hold."""
        return sum(map(len, self._held.values())) + sum(map(len, self._spare))

    def take(self, request: str, prompt: Sequence[int], *, reuse: bool) -> Copy | None:
        """Give a request the next row; the copy that saves it reading, where there is one.

        The prompt's last token is always left to read: the answer begins with its logits.
        """
        row = len(self.order)
        assert row < self._slots
        found = self._longest(prompt) if reuse and self._spare else None
        self.order.append(request)
        self._held[request] = [] if found is None else list(prompt[: found[1]])
        return None if found is None else Copy(found[0], row, found[1])

    def hold(self, request: str, tokens: Sequence[int]) -> None:
        """The request's row holds these too from this step on."""
        self._held[request] += tokens

    def leave(self, request: str, behind: str | None = None, *, followed_by: int = 0) -> list[Copy]:
        """Free a row: keep what it holds in a spare one, and fill the gap.

        Args:
            behind: a request that must stay behind all others.
            followed_by: requests that leave in the same step; where they fill all spare rows,
                nothing is kept for them to overwrite.
        """
        row, held = self.order.index(request), self._held.pop(request)
        copies = self._keep(row, held) if followed_by < len(self._spare) else []
        if self.order[-1] == behind != request:
            copies += self._fill(row, len(self.order) - 2)
            row = len(self.order) - 2
        copies += self._fill(row, len(self.order) - 1)
        self.order.pop()
        return copies

    def _fill(self, gap: int, row: int) -> list[Copy]:
        """Move a row's request into a gap."""
        if gap == row:
            return []
        moved = self.order[gap] = self.order[row]
        return [Copy(row, gap, len(self._held[moved]))]

    def gains(self, prompt: Sequence[int], begun: Sequence[Sequence[int]]) -> bool:
        """Whether one of these texts shares a longer beginning with a prompt than any row does."""
        shared = max((common(text, prompt[:-1]) for text in begun), default=0)
        if not self._spare or shared < SHORTEST_PREFIX:
            return False
        return shared > max(tokens for _, tokens in self._shared(prompt))

    def _longest(self, prompt: Sequence[int]) -> tuple[int, int] | None:
        """(row, tokens) of the longest beginning of a prompt that some row holds."""
        row, tokens = max(self._shared(prompt), key=lambda pair: pair[1])
        if tokens < SHORTEST_PREFIX:
            return None
        if row >= self._slots:
            self._touch(row - self._slots)
        return row, tokens

    def _shared(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """Of every row, how many tokens of the prompt's beginning it holds."""
        rows = [(row, self._held[request]) for row, request in enumerate(self.order)]
        rows += [(self._slots + n, tokens) for n, tokens in enumerate(self._spare)]
        return [(row, common(tokens, prompt[:-1])) for row, tokens in rows]

    def _keep(self, row: int, held: list[int]) -> list[Copy]:
        if not self._spare or len(held) < SHORTEST_PREFIX:
            return []
        shared = [common(tokens, held) for tokens in self._spare]
        if max(shared) == len(held):
            self._touch(shared.index(len(held)))
            return []
        # What goes on from a kept one takes its place; otherwise the one longest unused goes.
        extended = [
            n for n, tokens in enumerate(self._spare) if tokens and shared[n] == len(tokens)
        ]
        spare = extended[0] if extended else self._used.index(min(self._used))
        self._spare[spare] = held
        self._touch(spare)
        return [Copy(row, self._slots + spare, len(held))]

    def _touch(self, spare: int) -> None:
        self._clock += 1
        self._used[spare] = self._clock


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest beginning that both share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        # Slices compare in C; prompts run to thousands of tokens.
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
