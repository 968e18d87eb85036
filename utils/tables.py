"""Tables: CSV that keeps every file name, CSV as people write it, and Markdown."""

from __future__ import annotations

import codecs
import csv
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from utils.errors import UserError

CSV_FORMAT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # of open
DELIMITERS = ",;\t|"
JOINERS = "\u200c\u200d"  # invisible, and a part of some words and emoji


def csv_writer(file: IO[str]) -> csv.writer:
    """Return a writer of rows for a file that was opened by `CSV_FORMAT`."""
    # With these ends of lines the module quotes carriage returns in names, too.
    return csv.writer(file, lineterminator="\r\n")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file; a file name that is not UTF-8 keeps its bytes."""
    with open(path, "w", **CSV_FORMAT) as out:
        table = csv_writer(out)
        table.writerow(columns)
        table.writerows(rows)


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Read columns of a table, whatever its encoding, its delimiter and the case of its head.

    Yields the place of each row, for messages, and its cells. Bytes that are not UTF-8 are kept as
    in file names. Raises UserError if the file lacks a column or is no table.
    """
    with open(file, "rb") as start:
        is_utf16 = start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = {"encoding": "utf-16" if is_utf16 else "utf-8-sig"}
    try:
        with open(file, **CSV_FORMAT | encoding) as lines:
            head = lines.readline()
            n_above = 1
            if head.lower().startswith("sep="):  # a line for Excel alone
                head = lines.readline()
                n_above = 2
            for delimiter in DELIMITERS:
                cells = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
                names = [clean(name).lower() for name in cells]
                if set(columns) <= set(names):
                    break
            else:
                raise UserError(f"{file}: name its columns {','.join(columns)} in the first line")
            places = [names.index(name) for name in columns]
            table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row in filter(None, table):
                cells = [row[place] if place < len(row) else "" for place in places]
                yield f"{file}: line {table.line_num + n_above}", cells
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a table ({error}); save it as CSV in UTF-8") from None


def clean(name: str) -> str:
    """Return a name in Unicode's NFC, without invisible characters, its words one blank apart."""
    signs = (c for c in name if c in JOINERS or unicodedata.category(c) != "Cf")
    words = "".join(signs).split()
    return unicodedata.normalize("NFC", " ".join(words).strip(f" {JOINERS}"))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as Markdown, the first one as the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in lines)
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)
    return rows.replace(" --- ", "---")
