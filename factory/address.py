"""Which addresses a download may connect to: those of the open internet, whatever name, redirect or spelling leads there."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import TargetUnavailable


class Refused(Exception):
    """An answer that will not change: its reason goes to the dead letter."""


def refuse_address(url: str, allow_private: bool) -> None:
    """Raises Refused for what is neither http nor https, carries a password, or names an address that is not public."""
    from yarl import URL

    try:
        parts = urlsplit(url)
        # As aiohttp will read it, which makes plain digits of all others: `１２７.0.0.1` is this machine too.
        host, _ = URL(url).raw_host, parts.port
    except ValueError:
        raise Refused("not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Refused("not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise Refused("the URL carries a user name or password")
    try:
        address = str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        if host.replace(".", "").isdigit():
            # aiohttp takes it for an address and asks no resolver, and the system would make one of it.
            raise Refused("an address that is not spelled as one") from None
        return  # a name: the resolver looks at where it leads
    if not allow_private and not is_public(address):
        raise Refused(_NOT_PUBLIC)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where IPv6 wraps IPv4."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast


def guarded_resolver(allow_private: bool) -> Any:
    """aiohttp's resolver, which finds no address that is not public unless it may."""
    aiohttp = find_aiohttp()

    class Guarded(aiohttp.ThreadedResolver):
        """Gives only addresses that may be connected to; aiohttp connects to just these."""

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            found = await super().resolve(host, port, family)
            if not allow_private and not all(is_public(one["host"].partition("%")[0]) for one in found):
                raise OSError(_NOT_PUBLIC)
            return found

    return Guarded()


_NOT_PUBLIC = "the address is not public"


def refusal_in(error: BaseException | None) -> str:
    """The resolver's refusal inside of the errors that aiohttp wraps it in; empty if it is none."""
    while error is not None:
        if _NOT_PUBLIC in str(error):
            return _NOT_PUBLIC
        error = error.__cause__
    return ""


def find_aiohttp() -> Any:
    """Raises TargetUnavailable if it is not installed."""
    try:
        import aiohttp
    except ImportError:
        raise TargetUnavailable("downloading needs aiohttp", remedy="pip install 'edgefusion[urls]'") from None
    return aiohttp
