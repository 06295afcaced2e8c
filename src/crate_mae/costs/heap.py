"""The heap of a process on Linux: what the C library needs beyond the tensors that live in it.

A model without numbers of glibc's `posix_memalign`, by which PyTorch takes memory on a CPU. Blocks are laid one after
another; a freed block joins its free neighbours, and the smallest free block that is large enough is taken next. Large
enough means room for the alignment as well, so that the hole left by a tensor cannot take another of the same size:
that is where the quarter comes from by which a process may exceed its tensors.
"""

import bisect

_ALIGNMENT = 64 + 32  # what an aligned block asks for beyond itself while it is looked for
_HEADER = 16
_LEAST_SPLIT = 32
_FIRST_THRESHOLD = 128 * 1024  # from here on a block gets memory of its own, until such a block is freed,
_LAST_THRESHOLD = 32 * 2**20  # which raises the threshold to its size, at most to this


class Heap:
    """Blocks by name, laid out as glibc would.

    Attributes:
        peak: the most bytes that were taken from the system at once.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._top = 0  # where the last block ends,
        self._end = 0  # and the memory taken for the heap
        self._mapped = 0
        self._threshold = _FIRST_THRESHOLD
        self._blocks: dict[int, tuple[int | None, int]] = {}  # address (None: memory of its own) and size
        self._free: dict[int, int] = {}  # size by address,
        self._free_ends: dict[int, int] = {}  # address by end,
        self._by_size: list[tuple[int, int]] = []  # and (size, address) in order

    def allocate(self, block: int, size: int) -> None:
        """Find room for a block."""
        size = -(-size // 16) * 16 + _HEADER
        wanted = size + _ALIGNMENT
        place = bisect.bisect_left(self._by_size, (wanted, 0))
        if place < len(self._by_size):
            room, address = self._by_size[place]
            self._remove(address, room)
            if room - size >= _LEAST_SPLIT:
                self._add(address + size, room - size)
                room = size
            self._blocks[block] = address, room
        elif size >= self._threshold and self._end - self._top < wanted:
            self._blocks[block] = None, size
            self._mapped += size
        else:
            self._blocks[block] = self._top, size
            self._top += size
            self._end = max(self._end, self._top)
        self.peak = max(self.peak, self._end + self._mapped)

    def release(self, block: int) -> None:
        """Free a block."""
        address, size = self._blocks.pop(block)
        if address is not None:
            self._add(address, size)
            return
        self._mapped -= size
        if self._threshold < size <= _LAST_THRESHOLD:
            self._threshold = size

    def _add(self, address: int, size: int) -> None:
        """Join a free block with its neighbours; the last one goes back to the system if it is large."""
        if (above := address + size) in self._free:
            size += self._remove(above, self._free[above])
        if address in self._free_ends:
            below = self._free_ends[address]
            size += self._remove(below, address - below)
            address = below
        if address + size < self._top:
            self._free[address] = size
            self._free_ends[address + size] = address
            bisect.insort(self._by_size, (size, address))
            return
        self._top = address
        if self._end - self._top > 2 * self._threshold:
            self._end = self._top

    def _remove(self, address: int, size: int) -> int:
        del self._free[address], self._free_ends[address + size]
        self._by_size.pop(bisect.bisect_left(self._by_size, (size, address)))
        return size
