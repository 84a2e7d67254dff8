"""Raw files: every format gives the same texts, in any cut, and what is broken is named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.data import pieces as cutting
from cpt.data.pieces import file_kind, pieces, records, texts
from cpt.data.split import utf8

DOCUMENTS = [
    "first",
    'ünï中文👩‍🚀 "quoted" \\ back',
    "",
    "line\nbreak\ttab\u2028",
    "x" * 5000,
    *(f"doc {i} " * i for i in range(60)),
]


def lines(documents: list[str | None], column: str = "text") -> bytes:
    return b"".join(
        json.dumps({"id": i, column: d, "n": [1]}, ensure_ascii=i % 2 == 0).encode() + b"\n"
        for i, d in enumerate(documents)
    )


def write(path: Path, documents: list[str]) -> str:
    suffix = "".join(s for s in path.suffixes if s != ".v1")
    if suffix == ".jsonl":
        path.write_bytes(lines(documents))
    elif suffix == ".jsonl.gz":
        half = lines(documents[:3]), lines(documents[3:])
        path.write_bytes(b"".join(map(gzip.compress, half)))  # two members, as `cat a.gz b.gz` makes
    elif suffix == ".jsonl.zst":
        half = lines(documents[:3]), lines(documents[3:])
        path.write_bytes(b"".join(bytes(pa.Codec("zstd").compress(h)) for h in half))
    else:
        table = pa.table({"n": list(range(len(documents))), "text": documents})
        if suffix == ".parquet":
            pq.write_table(table, path, row_group_size=10)
        elif suffix == ".feather":
            pyarrow.feather.write_feather(table, path, compression="zstd")
        elif suffix == ".arrow":  # the stream format, as Hugging Face datasets writes
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
    return str(path)


FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".feather"]


def read(paths: list[str], piece_bytes: int = 1000, column: str = "text") -> list[str]:
    return [t for piece in pieces(paths, column, piece_bytes) for t in texts(piece, column)]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("piece_bytes", [1, 100, 5000, 1 << 20])
def test_every_format_gives_the_same_texts_in_any_cut(tmp_path: Path, suffix: str, piece_bytes: int) -> None:
    path = write(tmp_path / f"corpus.v1{suffix}", DOCUMENTS)
    assert read([path], piece_bytes) == DOCUMENTS
    assert [t for _, t in records(path, "text")] == DOCUMENTS


def test_large_row_groups_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "LARGE_GROUP", 2000)
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": DOCUMENTS}), path)
    found = list(pieces([path], "text", 1000))
    assert len(found) > 5 and {p.kind for p in found} == {"table"}
    assert [t for p in found for t in texts(p, "text")] == DOCUMENTS


@given(st.lists(st.text(max_size=40), max_size=20), st.integers(1, 200), st.booleans())
@settings(max_examples=60)
def test_any_lines_in_any_cut(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], size: int, end: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = lines(documents)
    (folder / "x.jsonl").write_bytes(data if end else data.rstrip(b"\n"))
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(data if end else data.rstrip(b"\n")))
    assert read([str(folder / "x.jsonl")], size) == documents
    assert read([str(folder / "x.jsonl.gz")], size) == documents


def test_a_text_file_is_a_document_and_small_ones_share_a_piece(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 10, encoding="utf-8")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress("\ufeffgepackt".encode()))
    paths = sorted(map(str, tmp_path.iterdir()))
    assert read(paths, 250)[-1] == "gepackt" and read(paths, 250)[3] == "text 3\n" * 10
    assert 3 < len(list(pieces(paths, "text", 250))) < 8


def test_the_id_column_names_documents_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "A7", "text": "a"}\n\n{"text": "b"}\n')
    assert list(records(str(path), "text")) == [("A7", "a"), ("x.jsonl:1", "b")]


def test_crlf_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read([str(path)]) == ["a", "b"]


def test_half_surrogates_become_the_replacement_character() -> None:
    assert utf8(json.loads('"a\\ud83dz"')) == ("a\ufffdz", "a\ufffdz".encode())
    assert utf8("ä")[1] == b"\xc3\xa4"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("piece_bytes", [50, 1 << 20])
@pytest.mark.parametrize(
    "line, says",
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "bad \xff byte"}', "not UTF-8"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": 5}', "not a text but int"),
        (b'{"txt": "x"}', "no column `text`"),
        (b"\x00\x00\x00", "not JSON"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, suffix: str, piece_bytes: int, line: bytes, says: str) -> None:
    data = b"\n".join([lines(DOCUMENTS[:20]).rstrip(b"\n"), line, lines(DOCUMENTS[20:])])
    path = tmp_path / f"x.jsonl{suffix}"
    codec = pa.Codec("zstd")
    path.write_bytes({"": data, ".gz": gzip.compress(data), ".zst": bytes(codec.compress(data))}[suffix])
    with pytest.raises(UsageError, match=says) as error:
        read([str(path)], piece_bytes)
    assert f"`{path}` line 21" in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"x{suffix}"
    write(path, DOCUMENTS * 20)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"not at all" * 50, "empty": b""}[damage])
    try:
        found = read([str(path)])
    except UsageError as error:
        assert str(path) in error.message and "\n" not in error.message
    else:
        assert damage == "empty" and found == []


def test_a_list_instead_of_lines_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "a"}], indent=1))
    with pytest.raises(UsageError, match="line 1") as error:
        read([str(path)])
    assert "one JSON object a line" in error.value.hints[0]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_wrong_column_suggests_the_right_one(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"x{suffix}", ["a", "b"])
    with pytest.raises(UsageError, match="no column `texts`") as error:
        read([path], column="texts")
    assert "did you mean `text`?" in error.value.hints[0]


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int64, not text"):
        read([write(tmp_path / "x.parquet", ["a"])], column="n")


def test_names_tell_the_format() -> None:
    assert file_kind("/a/b.c/web.2024.jsonl.zst") == ("lines", "zstd")
    assert file_kind("X.PARQUET") == ("parquet", None)
    for name in ("x.csv", "x", "x.parquet.gz", "x.gz"):
        with pytest.raises(UsageError, match="cannot tell how to read"):
            file_kind(name)
