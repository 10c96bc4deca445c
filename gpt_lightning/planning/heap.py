"""What a process keeps of memory that it has freed: glibc's malloc, played through."""

from bisect import bisect_left, insort

LARGEST_THRESHOLD = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX where pointers have 64 bits
ALIGNMENT = (
    64  # torch's; what is cut off for it before and behind a block are scraps of about that size
)
TAKEN = 2  # of so many scraps one is soon a small object's; fitted to three runs, see docs/plan.md


class Heap:
    """Blocks as malloc lays them out in one arena.

    Small blocks come from a heap that grows at its end, from the smallest hole that is large enough; large ones from
    the system, to which they go back. What is small follows what was freed, up to 32 MiB, so the activations of
    most models are. A hole below a block in use stays resident. For its alignment a block needs a hole a
    little larger than itself, so one freed beside a scrap in use does not serve a block of its own size.
    """

    def __init__(self) -> None:
        self._threshold = 128 << 10  # bytes from which a block is the system's
        self._end = 0  # of the heap
        self._mapped = 0
        self._blocks: dict[
            int, tuple[int | None, int]
        ] = {}  # key → start in the heap or none, size
        self._holes: list[tuple[int, int]] = []  # size, start
        self._starts: dict[int, int] = {}  # of holes: start → size
        self._ends: dict[int, int] = {}  # of holes: end → start
        self._scraps = 0
        self._taken: list[int] = []  # scraps' starts

    @property
    def resident(self) -> int:
        """Bytes that the process holds."""
        return self._end + self._mapped

    def take(self, key: int, size: int) -> None:
        size = (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        at = bisect_left(self._holes, (size + ALIGNMENT, 0))
        if at == len(self._holes) and size >= self._threshold:
            self._mapped += size
            self._blocks[key] = None, size
            return
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
        start, size = self._blocks.pop(key)
        if start is not None:
            self._free(start, size)
            return
        self._mapped -= size
        if self._threshold < size <= LARGEST_THRESHOLD:
            self._threshold = size

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
        if start + size == self._end and size >= 2 * self._threshold:
            self._end = start  # trimmed
        else:
            self._dig(size, start)

    def _dig(self, size: int, start: int) -> None:
        insort(self._holes, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _fill(self, size: int, start: int) -> None:
        del self._holes[bisect_left(self._holes, (size, start))]
        del self._starts[start], self._ends[start + size]
