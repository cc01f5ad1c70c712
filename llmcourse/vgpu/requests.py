"""How many sectors and wavefronts the requests of a launch cost.

Each function takes a matrix with one row for each request (one memory instruction of one warp) and one
column for each lane. Lanes that take no part repeat an active lane's address, which costs nothing.
"""

from __future__ import annotations

import numpy as np

from llmcourse.vgpu.isa import BANKS, SECTOR_BYTES, WARP_SIZE

_SECTOR_SHIFT = SECTOR_BYTES.bit_length() - 1


def rows_of(address: np.ndarray, lanes: np.ndarray | None) -> np.ndarray:
    """Addresses of the active lanes → [requests, 32].

    address   int64 [active lanes], in lane order
    lanes     their numbers, ascending, counted over all warps; None if every lane of every warp is active
    """
    if lanes is None:
        return address.reshape(-1, WARP_SIZE)
    warp = lanes // WARP_SIZE
    first = np.empty(len(lanes), bool)
    first[:1] = True
    np.not_equal(warp[1:], warp[:-1], out=first[1:])
    rows = np.repeat(address[first][:, None], WARP_SIZE, axis=1)
    rows[np.cumsum(first) - 1, lanes % WARP_SIZE] = address
    return rows


def sectors(rows: np.ndarray) -> int:
    """Distinct 32-byte sectors of each request, summed. An aligned access never straddles two."""
    return distinct(rows >> _SECTOR_SHIFT)


def distinct(rows: np.ndarray) -> int:
    """Distinct values of each row, summed over the rows."""
    step = rows[:, 1:] - rows[:, :-1]
    if step.size and step.min() < 0:
        ordered = np.sort(rows, axis=1)
        step = ordered[:, 1:] - ordered[:, :-1]
    return len(rows) + int(np.count_nonzero(step))


def most_equal(rows: np.ndarray) -> int:
    """For each row the number of lanes that share its commonest value, summed: how atomics queue up."""
    ordered = np.sort(rows, axis=1)
    position = np.arange(rows.shape[1])
    new = np.ones(rows.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    start = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    return int((position - start + 1).max(axis=1).sum())


def wavefronts(rows: np.ndarray, size: int) -> tuple[int, int]:
    """(wavefronts, bank conflicts) of requests to shared memory that want `size` bytes a lane.

    A wavefront serves each bank once: one 4-byte word, to every lane that wants it. 8-byte accesses go by
    half warps and 16-byte ones by quarter warps, so that conflict-free they need 2 and 4 wavefronts; what
    a request needs beyond that counts as conflicts.
    """
    parts = max(1, size // 4)
    words = (rows >> 2).reshape(-1, WARP_SIZE // parts)
    passes = _busiest_bank(words)
    return passes, passes - len(rows) * parts


def _busiest_bank(words: np.ndarray) -> int:
    """For each row the most distinct words that any bank must give, summed."""
    step = words[:, 1:] - words[:, :-1]
    simple = (
        ((step == 0) | (step == step[:, :1]) & (step == 1)).all(axis=1)
        if step.size
        else np.ones(len(words), bool)
    )
    easy = int(np.count_nonzero(simple))
    if easy == len(words):
        return easy
    hard = np.sort(words[~simple], axis=1)
    new = np.ones(hard.shape, bool)
    np.not_equal(hard[:, 1:], hard[:, :-1], out=new[:, 1:])
    bank = np.arange(len(hard))[:, None] * BANKS + hard % BANKS
    counts = np.bincount(bank[new], minlength=len(hard) * BANKS)
    return easy + int(counts.reshape(-1, BANKS).max(axis=1).sum())
