"""Finding files, and the text that every machine has."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.data import catalog, icd10cm, readers
from cpt.plan.types import Source


def test_patterns_folders_and_single_files_are_found_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.parquet", "notes.txt", "x.csv", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [Path(p).name for p in readers.expand(["*.jsonl", "a.jsonl", str(tmp_path / "sub")], tmp_path)]
    assert names == ["a.jsonl", "b.jsonl", "c.parquet"]
    assert [Path(p).name for p in readers.expand(["**/*.parquet"], tmp_path)] == ["c.parquet"]
    assert [Path(p).name for p in readers.expand(["."], tmp_path)] == [
        "a.jsonl",
        "b.jsonl",
    ]  # text files by pattern only


def test_a_megatron_pair_is_one_entry_by_any_of_its_names(tmp_path: Path) -> None:
    for name in ("x_text.bin", "x_text.idx"):
        (tmp_path / name).touch()
    wanted = (str(tmp_path / "x_text.idx"),)
    assert readers.expand(["x_text"], tmp_path) == wanted == readers.expand(["x_text*"], tmp_path)
    source = Source(name="m", paths=(str(tmp_path / "x_text.bin"),))
    assert [row[0] for row in catalog.stamp(source)[1]] == [str(tmp_path / "x_text.bin"), str(tmp_path / "x_text.idx")]


@pytest.mark.parametrize(
    "pattern, says, hint",
    [
        ("data.jsonl", "no file matches `data.jsonl`", "did you mean `date.jsonl`?"),
        ("nowhere/*.jsonl", "no file matches", "is not a folder"),
        ("*.parquet", "no file matches", "looked in"),
        ("x.csv", "cannot tell how to read", "known:"),
    ],
)
def test_nothing_found_is_explained(tmp_path: Path, pattern: str, says: str, hint: str) -> None:
    for name in ("date.jsonl", "x.csv"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=says.replace("*", r"\*")) as error:
        readers.expand([pattern], tmp_path)
    assert any(hint in h for h in error.value.hints)


def test_identity_changes_with_content_time_and_options_but_not_with_the_folder(tmp_path: Path) -> None:
    found = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "x.jsonl"
        path.write_text("{}")
        os.utime(path, (5, 5))
        found.add(catalog.identity(Source(name=folder, paths=(str(path),))))
    assert len(found) == 1
    found.add(catalog.identity(Source(name="a", paths=(str(path),), valid=0.5)))
    os.utime(path, (6, 6))
    found.add(catalog.identity(Source(name="a", paths=(str(path),))))
    assert len(found) == 3


@pytest.fixture(scope="module")
def cache(tmp: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp.mktemp("texts")


def documents(name: str, cache: Path) -> list[dict[str, str]]:
    (path,) = readers.files(Source(name=name, reader=name), cache)
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_library_documentation_is_there_on_every_machine(cache: Path) -> None:
    found = documents("python_docs", cache)
    size = sum(len(d["text"].encode()) for d in found)
    assert len(found) > 1000 and size > 2e6
    if importlib.util.find_spec("sympy"):
        assert size == pytest.approx(readers.PythonDocs().size(Source(name="x"))[0], rel=0.4)
    assert len({d["id"] for d in found}) == len({d["text"] for d in found}) == len(found)
    text = "\n".join(d["text"] for d in found)
    assert "The simple form" in text and "class logging.Handler" in text  # a help topic and a docstring
    (first,) = readers.files(Source(name="f", reader="python_docs"), cache)
    written = os.stat(first).st_mtime_ns
    (again,) = readers.files(Source(name="g", reader="python_docs"), cache)
    assert again == first and os.stat(again).st_mtime_ns == written, "it is extracted once"


def test_extraction_imports_none_of_the_packages(tmp_path: Path) -> None:
    code = (
        "import sys; from cpt.data import python_docs; from itertools import islice; "
        "n = len(list(islice(python_docs.documents(), 300))); "
        "assert n == 300 and not {'sympy', 'torch', 'antigravity', 'simple_icd_10_cm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_the_icd_list_is_one_document_a_category(cache: Path) -> None:
    pytest.importorskip("simple_icd_10_cm")
    found = {d["id"]: d["text"] for d in documents("icd10cm", cache)}
    assert 1800 < len(found) < 2100 and 4e6 < sum(map(len, found.values())) < 5e6
    cholera = found["icd10cm/A00"]
    assert cholera.startswith("Certain infectious and parasitic diseases (A00-B99) / Intestinal infectious diseases")
    assert "\nA00.0 Cholera due to Vibrio cholerae 01, biovar cholerae. Also known as: Classical cholera." in cholera
    assert "Excludes" in found["icd10cm/E11"] and "Use an additional code" in found["icd10cm/E11"]


def test_a_missing_icd_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(icd10cm.importlib.util, "find_spec", lambda name: None)
    for call in (catalog.stamp, catalog.identity, lambda s: readers.files(s, cache)):
        with pytest.raises(UsageError, match="`simple-icd-10-cm` is not installed") as error:
            call(Source(name="icd", reader="icd10cm"))  # type: ignore[operator]
        assert error.value.exit_code == 2 and "pip install 'cpt[demo]'" in error.value.hints[0]


def test_looking_a_source_up_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    code = (
        "import sys; from cpt.data import catalog; from cpt.plan.types import DataOptions, Source; "
        "s = Source(name='x', paths=('x.jsonl',)); "
        "catalog.find(s, 'hash', DataOptions(), 'cache'); catalog.estimate(s); "
        "assert not {'numpy', 'pyarrow', 'tokenizers', 'torch', 'hydra'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
