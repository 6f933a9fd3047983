"""How much of a SQLite file a row takes, by the format's own arithmetic, and the page size that wastes least."""

from __future__ import annotations

SIZES = (4096, 8192, 16384, 32768, 65536)
#: Bytes of a row beside its numbers: name, checksum, times, a little metadata.
_BESIDE = 128
#: The same with a head, whose size nobody knows beforehand.
_WITH_HEAD = range(512, 8192, 256)


def row_bytes(row: int, page: int) -> float:
    """Return the bytes that one of many equal rows takes in a table, unused ends of pages with it.

    Source: https://www.sqlite.org/fileformat.html, section 1.6 "B-tree Pages"

    Args:
        row: Bytes of the row.
        page: Bytes of a page.

    Example:
        >>> row_bytes(6300, 4096), row_bytes(6300, 32768)
        (8192.0, 6553.6)
    """
    most, least = page - 35, (page - 12) * 32 // 255 - 23
    kept, overflow = row, 0
    if row > most:  # the rest of a long row lies in a chain of pages of its own
        tail = least + (row - least) % (page - 4)
        kept = tail if tail <= most else least
        overflow = -(-(row - kept) // (page - 4))
    a_page = (page - 8) // (kept + 9 + (4 if overflow else 0))
    return page / a_page + overflow * page


def page_size(numbers: int) -> int:
    """Return the page size at which rows waste least, with and without heads; of equal ones the smallest.

    Args:
        numbers: Bytes of the numbers of a row.

    Example:
        >>> page_size(2 * 3072), page_size(2 * 16384)
        (65536, 4096)
    """

    def waste(page: int) -> float:
        alone, *with_head = (
            row_bytes(row, page) / row for row in (numbers + b for b in (_BESIDE, *_WITH_HEAD))
        )
        return round(alone + sum(with_head) / len(with_head), 2)

    return min(SIZES, key=waste)
