"""Short forms of host names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.launch.slurm.hostlist import expand


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node[1-2,7],gpu-a[01-03]x", "node1 node2 node7 gpu-a01x gpu-a02x gpu-a03x"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[01-3]", "n01 n02 n03"),
        ("n[1-03]", "n1 n2 n3"),
        ("n[9-010]", "n9 n10"),
        ("n[001,1]", "n001 n1"),
        ("n[1,1]", "n1 n1"),
        ("[1-2]", "1 2"),
        (" a , b,,login.example.org", "a b login.example.org"),
        ("", ""),
        ("r1n[1-2],r2n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
    ],
)
def test_hosts_of_a_list(text: str, hosts: str) -> None:
    assert expand(text) == hosts.split()


@pytest.mark.parametrize(
    "text", ["n[1", "n1]", "n[]", "n[3-1]", "n[a-c]", "n[1-2-3]", "a[[1-2],3]", "n[1,a]", "n[-1]", "a b", "n[1]]"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of hosts"):
        expand(text)


@pytest.mark.parametrize("text", ["n[0-999999999]", "a[0-999]b[0-999]", "n[1-40000],m[1-40000]"])
def test_a_list_without_end_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="more than 65,536 hosts"):
        expand(text)


@given(st.text("n[]-,0123456789 ", max_size=30))
def test_any_text_gives_names_or_is_refused(text: str) -> None:
    try:
        hosts = expand(text)
    except ValueError:
        return
    assert all(host and not set(host) & set("[], ") for host in hosts)
