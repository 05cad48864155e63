"""The key by which clients are counted where a resource is limited per client."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network


def client_network(address: str) -> str:
    """Return the client's network: an IPv4 address itself, of an IPv6 address its /64.

    An IPv6 client usually has a whole /64 (RFC 6177), so a limit per address would not bind it.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return address  # empty for a Unix socket, or an address with a scope
    if isinstance(parsed, IPv6Address):
        return str(ip_network((int(parsed), 64), strict=False))
    return address
