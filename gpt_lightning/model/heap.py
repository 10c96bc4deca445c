"""What a process keeps of memory that it has freed: glibc's malloc, played through."""

from bisect import bisect_left, insort

ALIGNMENT = 64  # torch's, for which a block is that much larger


class Heap:
    """Blocks as malloc lays them out while a CPU trains: see ``training/allocator.py``.

    Each comes from the smallest hole that is large enough, else from the heap's end, and what is freed stays.
    """

    def __init__(self) -> None:
        self._end = 0
        self._blocks: dict[int, tuple[int, int]] = {}  # key → start, size
        self._holes: list[tuple[int, int]] = []  # size, start
        self._starts: dict[int, int] = {}  # of holes: start → size
        self._ends: dict[int, int] = {}  # of holes: end → start

    @property
    def resident(self) -> int:
        """Bytes that the process holds."""
        return self._end

    def take(self, key: int, size: int) -> None:
        size = (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        at = bisect_left(self._holes, (size, 0))
        if at < len(self._holes):
            hole, start = self._holes[at]
            self._fill(hole, start)
            if rest := hole - size:
                self._dig(rest, start + size)
        else:
            start = self._ends.get(self._end, self._end)  # a hole at the end grows
            if start != self._end:
                self._fill(self._end - start, start)
            self._end = start + size
        self._blocks[key] = start, size

    def give(self, key: int) -> None:
        start, size = self._blocks.pop(key)
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
