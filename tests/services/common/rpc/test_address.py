"""Addresses: which ones leave the machine, which ones are well formed."""

from __future__ import annotations

import pytest

from blockserve.common.rpc.address import is_host_and_port, is_local


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:7450", True),
        ("127.9.9.9:1", True),
        ("[::1]:7450", True),
        ("localhost:7450", True),
        ("unix:/run/zoo.sock", True),
        ("0.0.0.0:7450", False),
        ("[::]:7450", False),
        ("10.0.0.7:7450", False),
        ("zoo.example:7450", False),
        ("127.0.0.1.example:7450", False),
    ],
)
def test_which_addresses_only_this_machine_can_reach(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("address", "well_formed"),
    [
        ("127.0.0.1:0", True),
        ("[::1]:65535", True),
        ("zoo.example:7450", True),
        ("127.0.0.1:65536", False),
        ("127.0.0.1:-1", False),
        ("127.0.0.1:٣", False),
        ("127.0.0.1", False),
        (":7450", False),
        ("unix:/run/zoo.sock", False),
        ("", False),
    ],
)
def test_host_and_port_are_both_needed(address: str, well_formed: bool) -> None:
    assert is_host_and_port(address) is well_formed
