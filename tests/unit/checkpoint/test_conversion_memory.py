"""A conversion holds a few blocks, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.convert import llama, random_content
from cpt.checkpoint.writing import BLOCK
from tests import checkpoints

SMALL, LARGE = 15e6, 150e6  # parameters: 30 MB and 300 MB of weights
MOST, MORE = 80e6, 6e6  # of anonymous memory beside four blocks; and what the larger model may take more [bytes]

CONVERT = """
import sys
from pathlib import Path
from cpt.checkpoint import find
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.writing import write_file

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

source, out, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
content = find.known()[find.recognise(source)].open(source, Reading())
most = 0
def watch(payload, values):
    global most
    most = max(most, anonymous())
files = Files()
for file in find.writable()[to].plan(content, Writing()).files:
    write_file(file, content, out, files, watch=watch)
    (out / file.name).unlink()
assert "torch" not in sys.modules
print(most)
"""


def most_memory(parameters: float, folder: Path, to: str) -> int:
    """Most anonymous memory of a process that converts a Hugging Face folder of so many parameters [bytes]."""
    folder.mkdir()
    source = checkpoints.write(random_content(llama(parameters), folder, optimizer=False), "hf", folder / "hf")
    command = [sys.executable, "-c", CONVERT, str(source), str(folder / "out"), to]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory")
@pytest.mark.parametrize("to", ["atom", "torch_dist"])
def test_a_ten_times_larger_model_takes_no_more_memory(to: str, tmp_path: Path) -> None:
    small = most_memory(SMALL, tmp_path / "small", to)
    large = most_memory(LARGE, tmp_path / "large", to)
    assert large <= MOST + 4 * BLOCK
    assert large <= small + MORE
