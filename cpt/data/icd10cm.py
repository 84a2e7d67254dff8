"""The ICD-10-CM tabular list as text, from the XML inside the installed package `simple-icd-10-cm`.

The list is a work of the US government (CDC/NCHS) and in the public domain. The package is found, not imported:
importing it would parse the whole list.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cpt.base.errors import UsageError

# What an element's notes are called in the text.
_NOTES = {
    "inclusionTerm": "Also known as",
    "includes": "Includes",
    "excludes1": "Excludes (never coded with it)",
    "excludes2": "Excludes (coded elsewhere)",
    "codeFirst": "Code first",
    "useAdditionalCode": "Use an additional code",
    "codeAlso": "Code also",
    "notes": "Note",
    "sevenChrNote": "Note",
}


def find_xml() -> Path:
    """The tabular list on this machine.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec("simple_icd_10_cm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(p for folder in folders for p in Path(folder).glob("data/*tabular*.xml"))
    if not found:
        raise UsageError(
            "the ICD-10-CM list is not on this machine: the package `simple-icd-10-cm` is not installed",
            "`pip install 'cpt[demo]'` installs it",
        )
    return found[-1]


def stamp() -> Any:
    """Which list it is: name and size of the file."""
    path = find_xml()
    return ["icd10cm", 1, path.name, path.stat().st_size]


def documents() -> Iterator[tuple[str, str]]:
    """One document a category (A00, A01, ...): chapter and section, then each code with description and notes."""
    path = find_xml()
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UsageError(f"`{path}` is not whole: {error}", "install `simple-icd-10-cm` again") from None
    for chapter in root.iter("chapter"):
        for section in chapter.iter("section"):
            heading = f"{_words(chapter.find('desc'))} / {_words(section.find('desc'))}"
            for category in section.findall("diag"):
                lines = [_describe(code) for code in category.iter("diag")]
                yield f"icd10cm/{_words(category.find('name'))}", heading + "\n\n" + "\n".join(lines)


def _describe(code: ElementTree.Element) -> str:
    """A code in one line: name, description, notes."""
    text = f"{_words(code.find('name'))} {_words(code.find('desc'))}."
    for tag, label in _NOTES.items():
        notes = [_words(note).rstrip(".:") for part in code.findall(tag) for note in part.iter("note")]
        if notes:
            text += f" {label}: {'; '.join(notes)}."
    return text


def _words(element: ElementTree.Element | None) -> str:
    return " ".join((element.text or "").split()) if element is not None else ""
