"""What a user of skeleton would notice: asked of the service itself."""

from __future__ import annotations

from guests import Host, inventory_of

from voip_stack import lab

ADDRESS = inventory_of("skeleton-1")["internal_address"]


def test_it_answers_over_the_network() -> None:
    with lab.current().connect(ADDRESS, 7001, timeout=10) as connection:
        connection.sendall(b"hello\n")
        assert connection.recv(100) == b"hello\n"


def test_it_listens_inside_only(host: Host) -> None:
    assert host.check_output("ss -Hltn 'sport = :7001'").split()[3] == f"{ADDRESS}:7001"
