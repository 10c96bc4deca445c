"""What a process keeps of memory that it has freed: glibc's malloc, played through."""

from bisect import bisect_left, insort

ALIGNMENT = (
    64  # torch's; what is cut off for it before and behind a block are scraps of about that size
)
TAKEN = 2  # of so many scraps one is soon a small object's; fitted, see docs/plan.md


class Heap:
    """Blocks as malloc lays them out while a CPU trains, see ``training/allocator.py``: what is freed stays.

    Each comes from the smallest hole that is large enough, else from the heap's end. For its alignment a block
    needs a hole a little larger than itself, so one freed beside a scrap in use does not serve a block of its
    own size.
    """

    def __init__(self) -> None:
        self._end = 0
        self._blocks: dict[int, tuple[int, int]] = {}  # key → start, size
        self._holes: list[tuple[int, int]] = []  # size, start
        self._starts: dict[int, int] = {}  # of holes: start → size
        self._ends: dict[int, int] = {}  # of holes: end → start
        self._scraps = 0
        self._taken: list[int] = []  # scraps' starts

    @property
    def resident(self) -> int:
        """Bytes that the process holds."""
        return self._end

    def take(self, key: int, size: int) -> None:
        size = (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        at = bisect_left(self._holes, (size + ALIGNMENT, 0))
        if at < len(self._holes):
            hole, start = self._holes[at]
            self._fill(hole, start)
            if rest := hole - size - ALIGNMENT:
                self._dig(rest, start + size + ALIGNMENT)
        else:
            start = self._ends.get(self._end, self._end)  # a hole at the end grows
            if start != self._end:
                self._fill(self._end - start, start)
            self._end = start + size + ALIGNMENT
        self._blocks[key] = start, size
        self._scraps += 1
        if self._scraps % TAKEN:
            self._free(start + size, ALIGNMENT)
        else:
            self._taken.append(start + size)

    def give(self, key: int) -> None:
        self._free(*self._blocks.pop(key))

    def give_scraps(self) -> None:
        """The small objects go: autograd's graph is done with."""
        taken, self._taken = self._taken, []
        for start in taken:
            self._free(start, ALIGNMENT)

    def _free(self, start: int, size: int) -> None:
        if (before := self._ends.get(start)) is not None:
            self._fill(start - before, before)
            start, size = before, size + start - before
        if (after := self._starts.get(start + size)) is not None:
            self._fill(after, start + size)
            size += after
        self._dig(size, start)

    def _dig(self, size: int, start: int) -> None:
        insort(self._holes, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _fill(self, size: int, start: int) -> None:
        del self._holes[bisect_left(self._holes, (size, start))]
        del self._starts[start], self._ends[start + size]
