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


def atomic_sectors(address: np.ndarray, lanes: np.ndarray | None) -> int:
    """Sectors that atomic requests visit: each as often as lanes queue for its most wanted word.

    Takes the active lanes' addresses in bytes, and their numbers as `rows_of` does.
    """
    warp = np.arange(len(address)) // WARP_SIZE if lanes is None else lanes // WARP_SIZE
    order = np.lexsort((address, warp))
    warp, address = warp[order], address[order]
    new = np.ones(len(address), bool)
    new[1:] = (warp[1:] != warp[:-1]) | (address[1:] != address[:-1])
    starts = np.flatnonzero(new)
    queue = np.diff(np.append(starts, len(address)))
    warp, sector = warp[starts], address[starts] >> _SECTOR_SHIFT
    first = np.ones(len(starts), bool)
    first[1:] = (warp[1:] != warp[:-1]) | (sector[1:] != sector[:-1])
    return int(np.maximum.reduceat(queue, np.flatnonzero(first)).sum())


def wavefronts(rows: np.ndarray, size: int, active: np.ndarray | None = None) -> tuple[int, int]:
    """(wavefronts, bank conflicts) of requests to shared memory that want `size` bytes a lane.

    active   bool [requests, 32]; None if every lane takes part

    A wavefront serves each bank once: one 4-byte word, to every lane that wants it. 8-byte accesses go by
    half warps and 16-byte ones by quarter warps, unless two of these can share a wavefront: they do if every
    lane wants what its neighbour wants, the next one or the next but one (found by measuring, on Volta and
    later; equal to Nsight Compute's counts for this course's kernels). Wavefronts beyond one for each part
    are the conflicts.
    """
    if size <= 4:
        passes = _busiest_bank(rows >> 2)
        return passes, passes - len(rows)
    unit = WARP_SIZE if size == 8 else WARP_SIZE // 2
    words = (rows >> 2).reshape(-1, unit)
    takes = np.ones(words.shape, bool) if active is None else active.reshape(-1, unit)
    some = takes.any(axis=1)
    words, takes = words[some], takes[some]
    merged = _like_neighbour(words, takes, 1) | _like_neighbour(words, takes, 2)
    parts, part_takes = words[~merged].reshape(-1, unit // 2), takes[~merged].reshape(-1, unit // 2)
    some = part_takes.any(axis=1)
    parts, part_takes = parts[some], part_takes[some]
    passes = _busiest_bank(_only(words[merged], takes[merged])) + _busiest_bank(_only(parts, part_takes))
    return passes, passes - int(np.count_nonzero(merged)) - len(parts)


def _like_neighbour(words: np.ndarray, takes: np.ndarray, distance: int) -> np.ndarray:
    """bool [rows]: every lane wants what its neighbour at `distance` wants, where both take part."""
    other = np.arange(words.shape[1]) ^ distance
    return ((words == words[:, other]) | ~takes | ~takes[:, other]).all(axis=1)


def _only(words: np.ndarray, takes: np.ndarray) -> np.ndarray:
    """Lanes that take no part repeat what their row's first active lane wants."""
    if not len(words) or takes.all():
        return words
    first = np.take_along_axis(words, takes.argmax(axis=1)[:, None], axis=1)
    return np.where(takes, words, first)


def _busiest_bank(words: np.ndarray) -> int:
    """For each row the most distinct words that any bank must give, summed."""
    if not len(words):
        return 0
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
