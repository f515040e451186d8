"""The compiled loops that turn UTF-8 bytes into token ids, many documents at a time.

In: the bytes of all documents one after the other and where each begins. Out: their ids, one flat array. The text is
cut into pieces (words, numbers, marks, white space) as the tokenizer's regular expression would cut it; 98 % of all
pieces were met before and their ids lie in a table; the others are merged pair by pair, lowest rank first, or go back to
the caller where the model is not a BPE. Costs 50-100 MB/s per core; memory is bounded whatever the text: the tables
below forget, and 1 MB of one letter is merged with a heap.

All loops stand in this one file because numba's cache on disk looks at the time stamp of the calling file only: a change
in another file would leave stale machine code. Little-endian machines only, as everything here that touches ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Ids = NDArray[np.uint32]

OTHER, LETTER, NUMBER, SPACE, NEWLINE = 0, 1, 2, 3, 4
CUT_WORDS, CUT_GPT2, CUT_CHARACTERS = 0, 1, 2

SHORT_BYTES = 16
"""A piece up to this long is its own key: two machine words."""
_LONG_BYTES = 128
"""A longer piece is not remembered."""
_ALL_MERGED_BY_SCAN = 32
"""A piece of more bytes is merged with a heap."""

DOCUMENT, AT, REST, OUT, MISS_START, MISS_STOP = 0, 1, 2, 3, 4, 5
"""Places in the state that `encode_documents` keeps between calls."""

_ENTRIES, _BYTES_USED, _IDS_USED = 0, 1, 2

_K0, _K1, _K2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xD6E8FEB86659FD93)
_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)
_ZERO, _ONE, _THREE, _EIGHT, _MIX, _HALF = (np.uint64(value) for value in (0, 1, 3, 8, 29, 32))
_LOW_HALF = np.uint64(0xFFFFFFFF)
_TOP_BITS = np.uint64(0x8080808080808080)
_LOW_BITS = np.uint64(0x7F7F7F7F7F7F7F7F)
_LOWER = np.uint64(0x2020202020202020)
_FROM_A = np.uint64(0x1F1F1F1F1F1F1F1F)
_PAST_Z = np.uint64(0x0505050505050505)
_FIRST_TOP = np.uint64(0x80)
_NO_MERGE = _ONES


class Pieces(NamedTuple):
    """A hash table from byte strings to ids. Full, it forgets all."""

    slots: Numbers
    """Number of the entry plus one; 0 is free."""
    entries: Numbers
    """Four per entry: where its bytes start, how many, where its ids start, how many."""
    text: Bytes
    ids: Ids
    used: Numbers
    """Entries, bytes and ids in use."""


class Tables(NamedTuple):
    """What encoding looks up."""

    classes: Bytes
    """OTHER ... NEWLINE by code point."""
    lead: Bytes
    """By byte: 1 a letter that starts a piece, 2 a mark that a word may start with, 0 look closer."""
    short: Words
    """Pieces of up to 16 bytes and 3 ids, two to a cache line of 8 words: 16 bytes of text; length, count and first id;
    second and third id. The newer of the two stands first, the older is forgotten."""
    long: Pieces
    """Other pieces met before."""
    whole: Pieces
    """Pieces that are a token as they stand, whatever the merges say."""
    pairs: Words
    """Merges: left id and right id, then rank and merged id; hashed, all ones is free."""
    byte_ids: Ids
    cut: int
    chop_chars: int
    """A piece of more characters goes in parts of so many; 0: never."""
    merges: bool
    """False: a piece that is in no table goes back to the caller."""


@intrinsic
def _load(typing: Any, data: Any, at: Any) -> Any:
    """Eight bytes from anywhere, as a machine word."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(data, types.int64), build


@intrinsic
def _trailing_zeros(typing: Any, word: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), build


@njit(cache=True)
def _look(data: Bytes, at: int, end: int, classes: Bytes) -> tuple[Any, Any]:
    """Class and width of the character at a place. Bytes that are no UTF-8 are OTHER, one each."""
    byte = np.int64(data[at])
    if byte < 0x80:
        return classes[byte], 1
    width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
    if byte < 0xC0 or at + width > end:
        return np.uint8(OTHER), 1
    point = byte & (0x7F >> width)
    for place in range(at + 1, at + width):
        point = point << 6 | np.int64(data[place] & 0x3F)
    return (classes[point] if point < len(classes) else np.uint8(OTHER)), width


@njit(cache=True)
def _run(data: Bytes, at: int, end: int, classes: Bytes, kind: Any) -> Any:
    """Where a run of characters of one class ends."""
    while at < end:
        found, width = _look(data, at, end, classes)
        if found != kind:
            break
        at += width
    return at


@njit(cache=True)
def _contraction(data: Bytes, at: int, end: int, fold: bool) -> Any:
    """Where 's 't 'm 'd 're 've 'll ends, looking behind the apostrophe; 0: there is none.

    With `fold` in any case, where U+017F, the long s, is an s.
    """
    left = end - at
    lower = np.uint8(32) if fold else np.uint8(0)
    if left >= 1:
        first = data[at] | lower
        if first == 115 or first == 116 or first == 109 or first == 100:
            return at + 1
    if left >= 2:
        if fold and data[at] == 0xC5 and data[at + 1] == 0xBF:
            return at + 2
        first, second = data[at] | lower, data[at + 1] | lower
        if ((first == 114 or first == 118) and second == 101) or (first == 108 and second == 108):
            return at + 2
    return 0


@njit(cache=True)
def _spaces(data: Bytes, at: int, end: int, classes: Bytes, keep_lines: bool) -> Any:
    """Where white space is cut: behind its last line break, else before its last character if a word follows."""
    start, last, line_end = at, at, 0
    while at < end:
        kind, width = _look(data, at, end, classes)
        if kind < SPACE:
            break
        last = at
        at += width
        if kind == NEWLINE:
            line_end = at
    if keep_lines and line_end:
        return line_end
    return last if at < end and last > start else at


@njit(cache=True)
def _words_stop(data: Bytes, at: int, end: int, classes: Bytes) -> Any:
    """Where the piece at a place ends, as Llama 3 cuts."""
    kind, width = _look(data, at, end, classes)
    after = at + width
    if kind == LETTER:
        return _run(data, after, end, classes, LETTER)
    if kind == NUMBER:
        for _ in range(2):
            if after < end:
                kind, width = _look(data, after, end, classes)
                after += width if kind == NUMBER else 0
        return after
    if data[at] == 39:
        stop = _contraction(data, after, end, True)
        if stop:
            return stop
    following, width = _look(data, after, end, classes) if after < end else (np.uint8(SPACE), 0)
    if following == LETTER and kind != NEWLINE:
        return _run(data, after + width, end, classes, LETTER)
    if kind == OTHER or (data[at] == 32 and following == OTHER):
        return _run(data, _run(data, after, end, classes, OTHER), end, classes, NEWLINE)
    return _spaces(data, at, end, classes, True)


@njit(cache=True)
def _gpt2_stop(data: Bytes, at: int, end: int, classes: Bytes) -> Any:
    """Where the piece at a place ends, as GPT-2 cuts."""
    kind, width = _look(data, at, end, classes)
    after = at + width
    if data[at] == 39:
        stop = _contraction(data, after, end, False)
        if stop:
            return stop
    if data[at] == 32 and after < end:
        following, width = _look(data, after, end, classes)
        if following < SPACE:
            return _run(data, after + width, end, classes, following)
    if kind < SPACE:
        return _run(data, after, end, classes, kind)
    return _spaces(data, at, end, classes, False)


@njit(cache=True)
def _stop(data: Bytes, at: int, end: int, classes: Bytes, cut: int) -> Any:
    if cut == CUT_WORDS:
        return _words_stop(data, at, end, classes)
    if cut == CUT_GPT2:
        return _gpt2_stop(data, at, end, classes)
    return at + _look(data, at, end, classes)[1]


@njit(cache=True)
def _chopped(data: Bytes, at: int, stop: int, chop_chars: int, classes: Bytes) -> Any:
    """The end of a piece's first so many characters."""
    for _ in range(chop_chars):
        if at >= stop:
            return stop
        at += _look(data, at, stop, classes)[1]
    return at


@njit(cache=True)
def _slot(pieces: Pieces, data: Bytes, start: int, length: int) -> Any:
    """The slot of a byte string: its own or the free one where it would go."""
    value = np.uint64(length)
    for place in range(start, start + length):
        value = (value ^ np.uint64(data[place])) * _K0
    value ^= value >> _MIX
    mask = len(pieces.slots) - 1
    slot = np.int64(value * _K1 >> _HALF) & mask
    while pieces.slots[slot]:
        entry = 4 * (pieces.slots[slot] - 1)
        if pieces.entries[entry + 1] == length:
            known = pieces.entries[entry]
            same = 0
            while same < length and pieces.text[known + same] == data[start + same]:
                same += 1
            if same == length:
                break
        slot = (slot + 1) & mask
    return slot


@njit(cache=True)
def _copy_known(pieces: Pieces, data: Bytes, start: int, length: int, ids: Ids, out: int) -> Any:
    """Writes the ids of a byte string and says how many; 0: it is not there."""
    found = pieces.slots[_slot(pieces, data, start, length)]
    if not found:
        return 0
    first, count = pieces.entries[4 * found - 2], pieces.entries[4 * found - 1]
    for index in range(count):
        ids[out + index] = pieces.ids[first + index]
    return count


@njit(cache=True)
def put(pieces: Pieces, data: Bytes, start: int, length: int, ids: Ids, out: int, count: int) -> None:
    """Adds a byte string that is not there. Without room, all others are forgotten first."""
    used = pieces.used
    full = 2 * used[_ENTRIES] >= len(pieces.slots) or 4 * used[_ENTRIES] >= len(pieces.entries)
    if full or used[_BYTES_USED] + length > len(pieces.text) or used[_IDS_USED] + count > len(pieces.ids):
        pieces.slots[:] = 0
        used[:] = 0
    entry, text, first = used[_ENTRIES], used[_BYTES_USED], used[_IDS_USED]
    slot = _slot(pieces, data, start, length)
    for index in range(length):
        pieces.text[text + index] = data[start + index]
    for index in range(count):
        pieces.ids[first + index] = ids[out + index]
    pieces.entries[4 * entry] = text
    pieces.entries[4 * entry + 1] = length
    pieces.entries[4 * entry + 2] = first
    pieces.entries[4 * entry + 3] = count
    pieces.slots[slot] = entry + 1
    used[_ENTRIES] += 1
    used[_BYTES_USED] += length
    used[_IDS_USED] += count


@njit(cache=True)
def put_all(pieces: Pieces, data: Bytes, offsets: Numbers, ids: Ids) -> None:
    """Adds byte strings of one id each; there must be room for them."""
    for index in range(len(ids)):
        start = offsets[index]
        put(pieces, data, start, offsets[index + 1] - start, ids, index, 1)


@njit(cache=True)
def _pair_place(pairs: Words, pair: Any) -> Any:
    """Where a pair stands, or the free place where it would go."""
    mask = len(pairs) // 2 - 1
    place = np.int64(((pair ^ (pair >> _MIX)) * _K0) >> _HALF) & mask
    while pairs[2 * place] != pair and pairs[2 * place] != _ONES:
        place = (place + 1) & mask
    return 2 * place


@njit(cache=True)
def put_pairs(pairs: Words, merges: Words) -> None:
    """Fills the table of merges: rows of left id, right id, merged id; their order is their rank."""
    for rank in range(len(merges) // 3):
        pair = merges[3 * rank] << _HALF | merges[3 * rank + 1]
        place = _pair_place(pairs, pair)
        pairs[place] = pair
        pairs[place + 1] = np.uint64(rank) << _HALF | merges[3 * rank + 2]


@njit(cache=True)
def _merge(pairs: Words, left: Any, right: Any) -> Any:
    """Rank and merged id of two ids; all ones: they do not merge."""
    place = _pair_place(pairs, np.uint64(left) << _HALF | np.uint64(right))
    return pairs[place + 1]


@njit(cache=True)
def _merge_by_scan(tables: Tables, data: Bytes, start: int, length: int, ids: Ids, out: int, ranks: Words) -> Any:
    """Writes the ids of a short piece, the best pair found by looking at all of them."""
    for index in range(length):
        ids[out + index] = tables.byte_ids[data[start + index]]
    for index in range(length - 1):
        ranks[index] = _merge(tables.pairs, ids[out + index], ids[out + index + 1])
    count = length
    while count > 1:
        best, where = _NO_MERGE, 0
        for index in range(count - 1):
            if ranks[index] < best:
                best, where = ranks[index], index
        if best == _NO_MERGE:
            break
        ids[out + where] = np.uint32(best & _LOW_HALF)
        count -= 1
        for index in range(where + 1, count):
            ids[out + index] = ids[out + index + 1]
            ranks[index - 1] = ranks[index]
        if where > 0:
            ranks[where - 1] = _merge(tables.pairs, ids[out + where - 1], ids[out + where])
        if where < count - 1:
            ranks[where] = _merge(tables.pairs, ids[out + where], ids[out + where + 1])
    return count


@njit(cache=True)
def _push(heap: Words, size: int, value: Any) -> Any:
    place = size
    while place > 0 and heap[(place - 1) >> 1] > value:
        heap[place] = heap[(place - 1) >> 1]
        place = (place - 1) >> 1
    heap[place] = value
    return size + 1


@njit(cache=True)
def _pop(heap: Words, size: int) -> Any:
    """Takes the smallest, which is heap[0], away."""
    size -= 1
    value, place = heap[size], 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = value
    return size


@njit(cache=True)
def _merge_by_heap(tables: Tables, data: Bytes, start: int, length: int, ids: Ids, out: int) -> Any:
    """Writes the ids of a long piece in n log n: a heap of (rank, place), a linked list of what is left.

    An entry whose place has merged meanwhile is told by its rank, which is no longer that of the pair there.
    """
    token = np.empty(length, np.uint32)
    before, after = np.empty(length, np.int32), np.empty(length, np.int32)
    heap = np.empty(3 * length, np.uint64)
    size = 0
    for index in range(length):
        token[index] = tables.byte_ids[data[start + index]]
        before[index], after[index] = index - 1, index + 1
    after[length - 1] = -1
    for index in range(length - 1):
        merge = _merge(tables.pairs, token[index], token[index + 1])
        if merge != _NO_MERGE:
            size = _push(heap, size, (merge >> _HALF) << _HALF | np.uint64(index))
    while size:
        top = heap[0]
        size = _pop(heap, size)
        place = np.int64(top & _LOW_HALF)
        right = after[place]
        if right < 0:
            continue
        merge = _merge(tables.pairs, token[place], token[right])
        if merge == _NO_MERGE or merge >> _HALF != top >> _HALF:
            continue
        token[place] = np.uint32(merge & _LOW_HALF)
        following = after[right]
        after[place], after[right] = following, -1
        if following >= 0:
            before[following] = place
            merge = _merge(tables.pairs, token[place], token[following])
            if merge != _NO_MERGE:
                size = _push(heap, size, (merge >> _HALF) << _HALF | np.uint64(place))
        left = before[place]
        if left >= 0:
            merge = _merge(tables.pairs, token[left], token[place])
            if merge != _NO_MERGE:
                size = _push(heap, size, (merge >> _HALF) << _HALF | np.uint64(left))
    count = 0
    standing: Any = 0
    while standing >= 0:
        ids[out + count] = token[standing]
        count += 1
        standing = after[standing]
    return count


@njit(cache=True)
def _key(data: Bytes, start: int, length: int) -> tuple[Any, Any]:
    """The bytes of a short piece as two machine words."""
    low, high = _ZERO, _ZERO
    if start + SHORT_BYTES <= len(data):
        low, high = _load(data, start), _load(data, start + 8)
    else:
        for index in range(min(8, length)):
            low |= np.uint64(data[start + index]) << np.uint64(8 * index)
        for index in range(8, length):
            high |= np.uint64(data[start + index]) << np.uint64(8 * index - 64)
    if length < 8:
        return low & ((_ONE << np.uint64(8 * length)) - _ONE), _ZERO
    if length < 16:
        high &= (_ONE << np.uint64(8 * length - 64)) - _ONE
    return low, high


@njit(cache=True)
def _bucket(short: Words, low: Any, high: Any) -> Any:
    value = (low ^ (low >> _HALF)) * _K0 ^ (high + _K2) * _K1
    value ^= value >> _MIX
    return np.int64((value * _K2) >> _HALF) & (len(short) // 8 - 1)


@njit(cache=True)
def remember(tables: Tables, data: Bytes, start: int, length: int, ids: Ids, out: int, count: int) -> None:
    """Keeps the ids of a piece for the next time it is met."""
    if length > SHORT_BYTES or count > 3:
        if length <= _LONG_BYTES:
            put(tables.long, data, start, length, ids, out, count)
        return
    short = tables.short
    low, high = _key(data, start, length)
    place = 8 * _bucket(short, low, high)
    for index in range(place + 3, place - 1, -1):
        short[index + 4] = short[index]
    first, second, third = np.uint64(ids[out]), np.uint64(ids[out + 1]), np.uint64(ids[out + 2])
    short[place], short[place + 1] = low, high
    short[place + 2] = np.uint64(length) | np.uint64(count) << _EIGHT | first << _HALF
    short[place + 3] = (second if count > 1 else _ZERO) | (third if count > 2 else _ZERO) << _HALF


@njit(cache=True)
def _resolve(tables: Tables, data: Bytes, start: int, length: int, ids: Ids, out: int, ranks: Words) -> Any:
    """Writes the ids of a piece that is not in the short table and says how many; 0: the caller must find them."""
    if length <= _LONG_BYTES:
        count = _copy_known(tables.long, data, start, length, ids, out)
        if count:
            return count
    count = _copy_known(tables.whole, data, start, length, ids, out)
    if not count:
        if not tables.merges:
            return 0
        if length <= _ALL_MERGED_BY_SCAN:
            count = _merge_by_scan(tables, data, start, length, ids, out, ranks)
        else:
            count = _merge_by_heap(tables, data, start, length, ids, out)
    remember(tables, data, start, length, ids, out, count)
    return count


@njit(cache=True)
def _letters(word: Any) -> Any:
    """The top bit of each of a word's eight bytes: is it an ASCII letter?"""
    low = (word | _LOWER) & _LOW_BITS
    return (low + _FROM_A) & ~(low + _PAST_Z) & ~word & _TOP_BITS


@njit(cache=True)
def _word_bytes(data: Bytes, at: int, end: int, lead: Any) -> Any:
    """Bytes of a word of fewer than 16 ASCII letters with its leading mark, if any; 0: it is no such word.

    Sixteen bytes at once; what is not found here is found by the slow way.
    """
    if at + SHORT_BYTES > len(data):
        return 0
    stops = ~_letters(_load(data, at)) & _TOP_BITS
    if lead == 2:
        stops &= ~_FIRST_TOP
    length: Any = np.int64(8)
    if stops:
        length = np.int64(_trailing_zeros(stops) >> _THREE)
    else:
        stops = ~_letters(_load(data, at + 8)) & _TOP_BITS
        length += np.int64(_trailing_zeros(stops) >> _THREE)
    if length >= end - at:
        length = end - at
    elif length == SHORT_BYTES or data[at + length] >= 0x80:
        return 0
    return length if length >= lead else 0


@njit(cache=True)
def encode_documents(
    data: Bytes, offsets: Numbers, close_id: int, tables: Tables, state: Numbers, ids: Ids, lengths: Numbers
) -> bool:
    """Writes the ids of all documents and how many each has; True when done.

    data, offsets: document i is data[offsets[i]:offsets[i + 1]]. close_id: written behind each document, unless below 0.
    ids: room for one id per byte and document, and 4 more. False: the piece data[state[MISS_START]:state[MISS_STOP]] is
    unknown; write its ids to `ids` from state[OUT] on, advance that, and call again.
    """
    ranks = np.empty(_ALL_MERGED_BY_SCAN, np.uint64)
    short, classes, leads = tables.short, tables.classes, tables.lead
    document, at, rest, out = state[DOCUMENT], state[AT], state[REST], state[OUT]
    while document < len(offsets) - 1:
        at, end = max(at, offsets[document]), offsets[document + 1]
        while at < end:
            length = np.int64(0)
            lead = leads[data[at]]
            if lead and at >= rest:
                length = _word_bytes(data, at, end, lead)
            if not length:
                stop = rest if at < rest else _stop(data, at, end, classes, tables.cut)
                if tables.chop_chars:
                    rest = stop
                    stop = _chopped(data, at, stop, tables.chop_chars, classes)
                length = stop - at
            if length <= SHORT_BYTES:
                low, high = _key(data, at, length)
                place = 8 * _bucket(short, low, high)
                if short[place] != low or short[place + 1] != high or short[place + 2] & np.uint64(0xFF) != length:
                    place += 4
                if short[place] == low and short[place + 1] == high and short[place + 2] & np.uint64(0xFF) == length:
                    ids[out] = np.uint32(short[place + 2] >> _HALF)
                    ids[out + 1] = np.uint32(short[place + 3] & _LOW_HALF)
                    ids[out + 2] = np.uint32(short[place + 3] >> _HALF)
                    out += np.int64((short[place + 2] >> _EIGHT) & np.uint64(0xFF))
                    at += length
                    continue
            count = _resolve(tables, data, at, length, ids, out, ranks)
            at += length
            out += count
            if not count:
                state[DOCUMENT], state[AT], state[REST], state[OUT] = document, at, rest, out
                state[MISS_START], state[MISS_STOP] = at - length, at
                return False
        if close_id >= 0:
            ids[out] = close_id
            out += 1
        lengths[document] = out
        document += 1
    state[DOCUMENT], state[OUT] = document, out
    for index in range(len(lengths) - 1, 0, -1):
        lengths[index] -= lengths[index - 1]
    return True


@njit(cache=True)
def count_pieces(
    data: Bytes, offsets: Numbers, classes: Bytes, cut: int, chop_chars: int, pieces: Pieces, counts: Numbers
) -> None:
    """Counts the pieces of all documents, by entry. A piece that is new when there is no more room is not counted."""
    for document in range(len(offsets) - 1):
        at, end, rest = offsets[document], offsets[document + 1], np.int64(0)
        while at < end:
            stop = rest if at < rest else _stop(data, at, end, classes, cut)
            if chop_chars:
                rest = stop
                stop = _chopped(data, at, stop, chop_chars, classes)
            found = pieces.slots[_slot(pieces, data, at, stop - at)]
            used = pieces.used
            if not found and used[_ENTRIES] < len(counts) and used[_BYTES_USED] + stop - at <= len(pieces.text):
                put(pieces, data, at, stop - at, pieces.ids, 0, 0)
                found = used[_ENTRIES]
            if found:
                counts[found - 1] += 1
            at = stop
