import socket

import pytest

from penstock.common.addresses import host_and_port, reachable


@pytest.mark.parametrize("wrong", ["", "host", ":1", "host:", "host:x", "host:65536", "::1:80"])
def test_what_is_no_host_and_port_is_refused(wrong):
    with pytest.raises(ValueError, match="HOST:PORT"):
        host_and_port(wrong)


@pytest.mark.parametrize("bound", ["0.0.0.0:8013", "[::]:8013"])
def test_a_wildcard_is_reached_by_the_hosts_name(bound):
    assert reachable(bound) == f"{socket.gethostname()}:8013"


def test_any_other_address_is_its_own():
    assert reachable("10.0.0.7:8013") == "10.0.0.7:8013"
