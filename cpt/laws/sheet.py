"""A file of measurements as columns of plain values: CSV, TSV, JSON lines (also `.gz` and `.zst`), Parquet.

Nothing is known here about laws: names stay as in the file, an empty cell is None, and numbers of CSV files are text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.registry import nearest
from cpt.base.units import show_bytes

LARGEST = 512 * 2**20  # [bytes] a table of runs is far smaller; a larger file is a mistake
EMPTY = frozenset({"", "na", "n/a", "null", "none"})


@dataclass(frozen=True)
class Sheet:
    """Columns by name, each with one value per row.

    Args:
        name: of the file, for messages.
        columns: values as they were read; None where a cell is empty.
        line: where each row stands in the file, counted from 1.
        lines_differ: whether lines and rows are counted differently (a CSV file has a head).
    """

    name: str
    columns: Mapping[str, Sequence[object]]
    line: Sequence[int]
    lines_differ: bool = False

    def __len__(self) -> int:
        return len(self.line)

    def place(self, row: int, column: str | None = None) -> str:
        """File, row and column of a value, for messages; rows are counted from 1."""
        at = f"`{self.name}`, row {row + 1}" + (f" (line {self.line[row]})" if self.lines_differ else "")
        return at + (f", column `{column}`" if column else "")


def read(path: str | Path) -> Sheet:
    """The columns of a file; its kind is taken from the ending, else from the first bytes.

    Raises:
        UsageError: no such file, not readable as a table, or without rows.
    """
    path = Path(path)
    data = _bytes(path)
    endings = [s.lower() for s in path.suffixes if s.lower() not in (".gz", ".zst")]
    ending = endings[-1] if endings else ""
    if ending in (".parquet", ".pq") or data[:4] == b"PAR1":
        return _parquet(path.name, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"`{path.name}`, line {line} is not UTF-8 text") from None
    if not text.strip():
        raise UsageError(f"`{path.name}` is empty", "a table has one row for each measurement")
    if ending in (".jsonl", ".ndjson", ".json") or (
        ending not in (".csv", ".tsv", ".txt") and text.lstrip()[0] in "{["
    ):
        return _json(path.name, text)
    return _csv(path.name, text, "\t" if ending == ".tsv" else None)


def _bytes(path: Path) -> bytes:
    import pyarrow as pa

    try:
        if path.is_dir():
            raise UsageError(f"`{path}` is a folder, and a table is a file")
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
            raise UsageError(
                f"there is no file `{path}`", *([f"did you mean `{path.with_name(near)}`?"] if near else [])
            )
    except ValueError:  # a null byte
        raise UsageError(f"`{path}` is not a file name") from None
    if (size := path.stat().st_size) > LARGEST:
        raise UsageError(f"`{path}` has {show_bytes(size)}: more than a table of runs can have")
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            data = stream.read(LARGEST + 1)
    except PermissionError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"`{path.name}` cannot be read: {_first_line(error)}") from None
    if len(data) > LARGEST:
        raise UsageError(f"`{path.name}` unpacks to more than a table of runs can have")
    return data


def _csv(name: str, text: str, delimiter: str | None) -> Sheet:
    head_line = next(line for line in text.splitlines() if line.strip())
    delimiter = delimiter or max(",;\t", key=head_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    head: list[str] | None = None
    cells: list[list[object]] = []
    lines: list[int] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if head is None:
                head = [cell.strip() for cell in row]
                continue
            if len(row) != len(head):
                raise UsageError(
                    f"`{name}`, row {len(lines) + 1} (line {reader.line_num}) has {len(row)} values, "
                    f"and the head names {len(head)} columns"
                )
            cells.append([None if cell.strip().lower() in EMPTY else cell.strip() for cell in row])
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UsageError(f"`{name}`, line {reader.line_num} is not CSV: {error}") from None
    assert head is not None
    _refuse_doubles(name, head)
    columns = {key: [row[i] for row in cells] for i, key in enumerate(head) if key}
    return _with_rows(Sheet(name, columns, lines, lines_differ=True))


def _json(name: str, text: str) -> Sheet:
    records: list[dict[str, object]] = []
    lines: list[int] = []
    for line, value in _json_values(name, text):
        if not isinstance(value, dict):
            raise UsageError(f"`{name}`, line {line} is no JSON object with a value for each column")
        records.append(value)
        lines.append(line)
    keys = dict.fromkeys(key for record in records for key in record)
    columns = {key: [_cell(record.get(key)) for record in records] for key in keys}
    return _with_rows(Sheet(name, columns, lines, lines_differ=lines != list(range(1, len(lines) + 1))))


def _json_values(name: str, text: str) -> Iterator[tuple[int, object]]:
    """The values of JSON lines with their line, or of one JSON list."""
    if text.lstrip()[0] == "[":
        value = _json_value(name, 1, text)
        if isinstance(value, list):
            yield from enumerate(value, start=1)
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json_value(name, number, line)


def _json_value(name: str, line: int, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{name}`, line {line} is not JSON: {_first_line(error)}") from None


def _parquet(name: str, data: bytes) -> Sheet:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
        names = list(table.column_names)
        values = [[_cell(v) for v in table.column(i).to_pylist()] for i in range(table.num_columns)]
    except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError, MemoryError) as error:
        raise UsageError(f"`{name}` cannot be read as Parquet: {_first_line(error)}") from None
    _refuse_doubles(name, names)
    return _with_rows(Sheet(name, dict(zip(names, values, strict=True)), range(1, table.num_rows + 1)))


def _cell(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in EMPTY else value


def _refuse_doubles(name: str, head: Sequence[str]) -> None:
    twice = sorted({key for key in head if key and head.count(key) > 1})
    if twice:
        raise UsageError(f"`{name}` has two columns `{twice[0]}`")


def _with_rows(sheet: Sheet) -> Sheet:
    if not len(sheet):
        raise UsageError(f"`{sheet.name}` has no rows", "a table has one row for each measurement")
    return sheet


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
