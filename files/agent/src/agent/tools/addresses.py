"""Which addresses a page may be fetched from: global unicast ones, and nothing that leads elsewhere by another name."""

from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network

# IANA's special-purpose registries, and 168.63.129.16, where Azure serves its virtual machines secrets.
NOT_GLOBAL_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Global unicast addresses are in 2000::/3; IPv4-mapped ones, NAT64, unique local, link-local and multicast are not.
GLOBAL_V6 = IPv6Network("2000::/3")
NOT_GLOBAL_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocols: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)


def is_global(address: str) -> bool:
    """Whether this, in the one canonical notation of its kind, is a global unicast address."""
    try:
        if ":" in address:
            v6 = IPv6Address(address)
            return v6.scope_id is None and v6 in GLOBAL_V6 and not any(v6 in network for network in NOT_GLOBAL_V6)
        v4 = IPv4Address(address)
    except AddressValueError:
        return False
    return not any(v4 in network for network in NOT_GLOBAL_V4)
