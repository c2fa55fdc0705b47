"""The k best chunks of many queries over postings of BM25 scores, exactly: `bm25.totals` and `bm25.best` say what is found.

Chunks are taken a window at a time, whose totals stay in the nearest cache. One query at a time adds up its lists. Many
go through the windows in batches: what a batch's terms have in a window is put side by side once, frequent terms as rows
of bytes that are added many chunks at a time. There scores are counted in steps, each at most one more than it is, so that
a sum says between which bounds a total lies. The few chunks whose upper bound reaches the k-th highest lower bound are
then added up from the lists themselves, in the query's order: scores, ties and ids are those of adding up everything.
Letters: Q queries, T terms of all queries, D different terms of a batch, P entries, W chunks of a window, K results.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retro_engine.jit import numba
from retro_engine.retrieval.bm25 import insert

WINDOW, STRETCH = 1 << 12, 64  # chunks; 8 KiB of sums
BATCH = 1024  # queries of a worker that go through the windows together
FEWEST = 8  # queries that go together: then putting side by side pays
LEAST_CHUNKS = 1 << 17  # below, what a batch begins with takes longer than it saves
FREQUENT = 128  # more than one in so many chunks has the term
MOST_ROWS = 256  # of frequent terms: 1 MiB a window
TOGETHER = 4  # rows added at once
ROUNDING = 2e-7  # of a sum, for each of its terms, in whatever order


def search(
    ends: np.ndarray,
    postings: tuple[np.ndarray, ...],
    highest: float,
    contents: np.ndarray,
    own: np.ndarray,
    num_chunks: int,
    k: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of many queries: ids (-1 = fewer) and scores [Q, K], best first. Query q's terms end at ends[q].

    `postings`: where each term's entries begin and end and its weight, one whatever the query, then chunks and scores.
    Chunks whose content is below 0, or is the query's `own`, are not found (`LeftOut`); ties keep the lower chunk.
    `highest`: of all scores.
    """
    own = own if len(own) else np.full(len(ends), -1, np.int32)
    if len(ends) < FEWEST or num_chunks < LEAST_CHUNKS:
        return _search_alone(ends, *postings, contents, own, num_chunks, k, workers)
    return _search_together(
        ends, postings, highest=highest, contents=contents, own=own, num_chunks=num_chunks, k=k, workers=workers
    )


@numba.njit(parallel=True, cache=True)
def _search_alone(ends, firsts, lasts, weights, chunks, scores, contents, own, num_chunks, k, workers):  # type: ignore[no-untyped-def]
    """Few queries, one after the other."""
    ids = np.full((len(ends), k), -1, np.int64)
    best = np.zeros((len(ends), k), np.float32)
    for worker in numba.prange(workers):
        total = np.zeros(WINDOW, np.float32)
        for query in range(worker, len(ends), workers):
            terms = slice(ends[query - 1] if query else 0, ends[query])
            cursors = firsts[terms].copy()
            for begin in range(0, num_chunks, WINDOW):
                _add_window(begin, cursors, lasts[terms], weights[terms], chunks, scores, total)
                _keep_window(begin, total, contents, own[query], ids[query], best[query])
    return ids, best


def _search_together(
    ends: np.ndarray,
    postings: tuple[np.ndarray, ...],
    highest: float,
    contents: np.ndarray,
    own: np.ndarray,
    num_chunks: int,
    k: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Many queries, in batches, which threads share: compiling a loop over them takes longer than all that it calls."""
    ids, best = np.full((len(ends), k), -1, np.int64), np.zeros((len(ends), k), np.float32)
    size = min(BATCH, -(-len(ends) // workers))
    *of_terms, chunks, scores = postings

    def search_from(first: int) -> None:
        some = slice(first, min(first + size, len(ends)))
        begin = int(ends[first - 1]) if first else 0
        firsts, lasts, weights = (values[begin : ends[some.stop - 1]] for values in of_terms)
        which, *different = _different(firsts, lasts, weights, num_chunks)
        given = which, *different, firsts, lasts, weights, chunks, scores, np.float32(highest), contents, own[some]
        _search_batch(ends[some] - begin, *given, num_chunks, ids[some], best[some])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(search_from, range(0, len(ends), size)))
    return ids, best


def _different(firsts: np.ndarray, lasts: np.ndarray, weights: np.ndarray, num_chunks: int) -> tuple[np.ndarray, ...]:
    """The different terms of a batch that any chunk has: [T] which one each is (-1 = none); where their lists begin and end,
    their weights, and the row of each of the most frequent, -1 for others."""
    is_known = lasts > firsts
    starts, places, which = np.unique(firsts[is_known], return_index=True, return_inverse=True)
    stops, weight_D = lasts[is_known][places], weights[is_known][places]
    which_T = np.full(len(firsts), -1)
    which_T[is_known] = which
    sizes = stops - starts
    frequent = np.argsort(-sizes, kind="stable")[:MOST_ROWS]
    frequent = frequent[sizes[frequent] * FREQUENT > num_chunks]
    row_D = np.full(len(starts), -1)
    row_D[frequent] = np.arange(len(frequent))
    return which_T, starts, stops, weight_D, row_D


@numba.njit(nogil=True, cache=True)
def _search_batch(  # type: ignore[no-untyped-def]
    ends, which_T, at, stops, weight_D, row_D, firsts, lasts, weights, chunks, scores, highest, contents, own, num_chunks, ids, best,
):  # fmt: skip
    """`search` for queries that go through the windows together; `at` moves through the different terms' lists."""
    longest, num_rows = 0, 0
    for query in range(len(ends)):
        longest = max(longest, ends[query] - (ends[query - 1] if query else 0))
    for term in range(len(row_D)):
        num_rows = max(num_rows, row_D[term] + 1)
    step = _step(row_D, at, stops, weight_D, scores, highest, longest)
    rows = np.zeros((num_rows + 1, WINDOW), np.uint8)  # the last one stays 0
    starts, listed = np.zeros(len(at) + 1, np.int64), np.empty((2, 4 * WINDOW), np.uint16)  # places and steps
    sums, counts = np.zeros(WINDOW, np.uint16), np.zeros(len(ends), np.int64)
    lows = np.zeros(best.shape, np.float32)
    noted, highs = np.empty((len(ends), 2 * WINDOW), np.int32), np.empty((len(ends), 2 * WINDOW), np.float32)
    for begin in range(0, num_chunks, WINDOW):
        listed = _put_together(begin, at, stops, weight_D / step, row_D, chunks, scores, rows, starts, listed)
        for query in range(len(ends)):
            terms = slice(ends[query - 1] if query else 0, ends[query])
            _add_steps(which_T[terms], row_D, rows, starts, listed, sums)
            bounds = best[query][-1], step, np.float32(terms.stop - terms.start)
            counts[query] = _note_window(
                begin, sums, bounds, contents, own[query], lows[query], noted[query], highs[query], counts[query]
            )
            if counts[query] > WINDOW or begin + WINDOW >= num_chunks:  # the next window may fill what is left
                found = noted[query][: counts[query]], highs[query]
                held = firsts[terms], lasts[terms], weights[terms], chunks, scores
                _add_up(held, found, lows[query][-1], ids[query], best[query])
                counts[query] = 0


@numba.njit(nogil=True, cache=True)
def _step(row_D, starts, stops, weight_D, scores, highest, longest):  # type: ignore[no-untyped-def]
    """The score that one step is: a row's highest is 254 of them at most, and no query's sum is beyond 16 bits."""
    bits, most = scores.view(np.int32), np.zeros(1, np.int32)
    heaviest = np.float32(0)
    for term in range(len(row_D)):
        heaviest = max(heaviest, weight_D[term])
    step = np.float32(highest * heaviest * longest / 65_000)
    for term in range(len(row_D)):
        if row_D[term] >= 0:
            top = np.int32(0)
            for entry in range(starts[term], stops[term]):
                top = max(top, bits[entry])
            most[0] = top  # of floats above 0 the highest has the highest bits
            step = max(step, most.view(np.float32)[0] * weight_D[term] / np.float32(254))
    return step if step > 0 else np.float32(1)


@numba.njit(nogil=True, cache=True)
def _put_together(begin, at, stops, each_D, row_D, chunks, scores, rows, starts, listed):  # type: ignore[no-untyped-def]
    """Every different term's scores of the chunks from `begin` on, in steps, at most one more than they are; returns the
    places and steps of those without a row, term after term as `starts` says. `at` moves behind the window."""
    count = 0
    for term in range(len(at)):
        entry, last, each, row = at[term], stops[term], each_D[term], rows[row_D[term]]
        starts[term] = count
        if row_D[term] >= 0:
            row[:] = 0
        elif count + WINDOW > listed.shape[1]:
            longer = np.empty((2, 2 * listed.shape[1]), np.uint16)
            longer[:, :count] = listed[:, :count]
            listed = longer
        while entry < last:
            place = np.int64(chunks[entry]) - begin
            if place >= WINDOW:
                break
            steps = np.int32(each * scores[entry]) + 1
            if row_D[term] >= 0:
                row[np.uint32(place)] = np.uint8(steps)
            else:
                listed[0, count], listed[1, count] = place, steps
                count += 1
            entry += 1
        at[term] = entry
    starts[len(at)] = count
    return listed


@numba.njit(nogil=True, cache=True)
def _add_steps(which_T, row_D, rows, starts, listed, sums):  # type: ignore[no-untyped-def]
    """A query's sums of a window, in steps; rows are added several at once, of which the last is of nothing."""
    some, held, places, steps = np.full(TOGETHER, len(rows) - 1), 0, listed[0], listed[1]
    sums[:] = 0
    for place in range(len(which_T) + 1):
        if place < len(which_T):
            term = which_T[place]
            if term < 0:
                continue
            if row_D[term] < 0:
                for entry in range(starts[term], starts[term + 1]):
                    sums[places[entry]] += steps[entry]
                continue
            some[held] = row_D[term]
            held += 1
        if held == TOGETHER or (held and place == len(which_T)):
            a, b, c, d = rows[some[0]], rows[some[1]], rows[some[2]], rows[some[3]]
            for chunk in range(WINDOW):
                sums[chunk] += np.uint16(a[chunk]) + np.uint16(b[chunk]) + np.uint16(c[chunk]) + np.uint16(d[chunk])
            some[:], held = len(rows) - 1, 0


@numba.njit(nogil=True, cache=True)
def _note_window(begin, sums, bounds, contents, own, lows, noted, highs, count):  # type: ignore[no-untyped-def]
    """Note the chunks of a window that may be among the k best, with their upper bounds; returns how many are noted.

    `lows` are the k highest lower bounds so far; `bounds`: the k-th score that is known, the step, the query's terms."""
    worst, step, num_terms = bounds
    rounding = np.float32(ROUNDING) * (num_terms + 8)
    fewest = _fewest(max(worst, lows[-1]), step, rounding)
    for start in range(0, WINDOW, STRETCH):
        is_any = np.uint16(0)
        for place in range(start, start + STRETCH):
            is_any |= np.uint16(sums[place] >= fewest)
        if not is_any:
            continue
        for place in range(start, start + STRETCH):
            if sums[place] < fewest:
                continue
            chunk, held = begin + place, np.float32(sums[place])
            if len(contents) and (contents[chunk] < 0 or contents[chunk] == own):
                continue
            noted[count], highs[count] = chunk, step * held * (1 + rounding)
            count += 1
            low = step * (held - num_terms - rounding * held)
            if low > lows[-1]:
                _insert_score(lows, low)
                fewest = _fewest(max(worst, lows[-1]), step, rounding)
    return count


@numba.njit(nogil=True, cache=True)
def _fewest(floor, step, rounding):  # type: ignore[no-untyped-def]
    """How many steps a total of `floor` has at least."""
    return np.uint16(max(1.0, min(65_535.0, np.floor(floor / (step * (1 + rounding))))))


@numba.njit(nogil=True, cache=True)
def _add_up(postings, found, floor, ids, best):  # type: ignore[no-untyped-def]
    """Take the totals of noted chunks, ascending, into the best: each added up in the order of the query's terms."""
    firsts, lasts, weights, chunks, scores = postings
    noted, highs = found
    count = 0
    for place in range(len(noted)):
        if highs[place] >= max(floor, best[-1]):
            noted[count] = noted[place]
            count += 1
    kept = noted[:count]
    totals = np.zeros(len(kept), np.float32)
    for term in range(len(firsts)):  # a list at a time, so that it is near
        entry, last = firsts[term], lasts[term]
        for place in range(len(kept)):
            entry = _seek(chunks, entry, last, kept[place])
            if entry == last:
                break
            if chunks[entry] == kept[place]:
                totals[place] += np.float32(weights[term] * scores[entry])
    for place in range(len(kept)):
        if totals[place] > best[-1]:
            insert(ids, best, kept[place], totals[place])


@numba.njit(nogil=True, cache=True)
def _seek(chunks, entry, last, chunk):  # type: ignore[no-untyped-def]
    """The first entry, of those from `entry` to `last`, that is not before `chunk`: in strides that double, then halve."""
    if entry >= last or chunks[entry] >= chunk:
        return entry
    stride = 1
    while entry + stride < last and chunks[entry + stride] < chunk:
        entry += stride
        stride *= 2
    low, high = entry + 1, min(entry + stride, last)
    while low < high:
        middle = (low + high) >> 1
        if chunks[middle] < chunk:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(nogil=True, cache=True)
def _add_window(begin, cursors, lasts, weights, chunks, scores, total):  # type: ignore[no-untyped-def]
    """Add a query's scores of the chunks from `begin` on; the cursors move behind the window."""
    for term in range(len(cursors)):
        entry, last, weight = cursors[term], lasts[term], weights[term]
        while entry < last:
            place = chunks[entry] - begin
            if place >= WINDOW:
                break
            total[np.uint32(place)] += np.float32(weight * scores[entry])
            entry += 1
        cursors[term] = entry


@numba.njit(nogil=True, cache=True)
def _keep_window(begin, total, contents, own, ids, best):  # type: ignore[no-untyped-def]
    """Take a window's totals into the best so far, and make them 0. Floats above 0 are ordered as their bits are, of which
    the highest of a stretch is found many at a time."""
    bits, highest = total.view(np.int32), np.zeros(1, np.int32)
    for start in range(0, WINDOW, STRETCH):
        top = np.int32(0)
        for place in range(start, start + STRETCH):
            top = max(top, bits[place])
        highest[0] = top
        if highest.view(np.float32)[0] > best[-1]:
            for place in range(start, start + STRETCH):
                chunk, score = begin + place, total[place]
                if score > best[-1] and not (len(contents) and (contents[chunk] < 0 or contents[chunk] == own)):
                    insert(ids, best, chunk, score)
        bits[start : start + STRETCH] = 0


@numba.njit(nogil=True, cache=True)
def _insert_score(lows, low):  # type: ignore[no-untyped-def]
    slot = len(lows) - 1
    while slot > 0 and lows[slot - 1] < low:
        lows[slot] = lows[slot - 1]
        slot -= 1
    lows[slot] = low
