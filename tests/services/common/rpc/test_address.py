"""Addresses: which ones leave the machine, which ones are well formed."""

from __future__ import annotations

import pytest

from blockserve.common.rpc.address import endpoint, is_host_and_port, is_local


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:7450", True),
        ("127.9.9.9:1", True),
        ("[::1]:7450", True),
        ("localhost:7450", True),
        ("unix:/run/zoo.sock", True),
        ("unix-abstract:zoo", True),
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


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("zoo.example:7450", ("zoo.example", 7450)),
        ("[::1]:7450", ("::1", 7450)),
        ("unix:zoo.sock", "zoo.sock"),
        ("unix:///run/zoo.sock", "/run/zoo.sock"),
        ("unix-abstract:zoo", "\0zoo"),
        ("dns:zoo.example:7450", ("zoo.example", 7450)),
        ("dns:///zoo.example:7450", ("zoo.example", 7450)),
        ("dns://127.0.0.53/zoo.example:7450", ("zoo.example", 7450)),
        ("dns:zoo.example", ("zoo.example", 443)),
        ("ipv4:10.0.0.7:7450", ("10.0.0.7", 7450)),
        ("ipv6:[::1]:7450", ("::1", 7450)),
        ("ipv6:2001:db8::1", None),
        ("ipv4:10.0.0.7:7450,10.0.0.8:7450", None),
        ("vsock:3:7450", None),
        ("xds:///zoo", None),
        ("dns:", None),
    ],
)
def test_where_a_connection_to_a_target_goes(target: str, expected: object) -> None:
    assert endpoint(target) == expected
