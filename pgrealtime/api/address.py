"""The address of the client that sent a request, through trusted proxies. Used by all routes."""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

from aiohttp import web

Network: TypeAlias = IPv4Network | IPv6Network

_MAX_PEERS: Final = 4096


def client_address(request: web.Request, trusted_proxies: Sequence[Network]) -> str:
    """Return the client's address, which must be equal in all requests for one connection."""
    name = request.transport and request.transport.get_extra_info("peername")
    peer = str(name[0]) if isinstance(name, tuple) else ""  # not of a Unix socket
    forwarded_for = request.headers.getall("X-Forwarded-For", [])
    return address_behind_proxies(peer, forwarded_for, trusted_proxies)


def address_behind_proxies(
    peer: str, forwarded_for: Sequence[str], trusted_proxies: Sequence[Network]
) -> str:
    """Return the address of the client behind trusted proxies.

    ``peer`` is the TCP connection's, empty for a Unix socket; ``forwarded_for`` the values of the
    ``X-Forwarded-For`` headers, in order.
    """
    if not trusted_proxies or not forwarded_for:
        return _address_of_peer(peer)
    address = _parse_address(peer)
    entries = [entry.strip() for value in forwarded_for for entry in value.split(",")]
    # Each proxy appends the address of its own peer. Anything before that is the client's own text
    # and may be forged, so the list is read from its end, while the author of an entry is trusted.
    while (
        entries and address is not None and any(address in network for network in trusted_proxies)
    ):
        before = _parse_address(entries.pop())
        if before is None:
            break
        address = before
    return peer if address is None else address.exploded


@lru_cache(_MAX_PEERS)
def _address_of_peer(peer: str) -> str:
    address = _parse_address(peer)
    return peer if address is None else address.exploded


def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address, with or without a port; None if it is none. Maps IPv4 in IPv6 to IPv4."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address
