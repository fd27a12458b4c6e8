# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which host of an inventory does what. PRIVATE to the collection: it may change at any time.

The hosts of the group `agent_stack` are the stack's. Without that group all are where that is clear: one host alone, or an inventory with a group `inference`.
In any other, a company's perhaps, the collection's own plays have no host.

Without a group `inference` every host is a stack of its own. With it, its hosts serve the model, and one host is the front, which carries all the rest:
the host outside of that group, or else the group's first. Hosts of the group `followers` add their GPUs to the model of their head, a host of `inference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Its hosts are the stack's, whoever else is in the inventory.
GROUP = "agent_stack"


@dataclass(frozen=True)
class Topology:
    """What the inventory says, and what that makes of one host. All but flags and `head_address`, an IP address, are names of hosts.

    host: this host's own name
    stack: all hosts of the stack; empty where the inventory does not say which they are
    fronts: hosts that carry the rest of the stack
    servers: hosts that serve the model
    apart: servers that are hosts apart from their front
    followers: hosts that add their GPUs to a server's model
    outside: hosts of neither group, where there is a group `inference`
    front: the front that this host belongs to
    serves, follows: whether this host is among the servers, or the followers
    is_peer: whether this host is apart from its front, and gets its requests
    peers: the hosts apart that this one, as their front, sends requests to
    partners: hosts at the other end of an encrypted connection: of a front its peers, of a peer the front
    head: the host whose model this one shares; without `followers`, itself
    nodes: the hosts of that model in the order of their ranks, the head first
    head_address: of the head, where several hosts share its model
    """

    host: str
    stack: tuple[str, ...]
    fronts: tuple[str, ...]
    servers: tuple[str, ...]
    apart: tuple[str, ...]
    followers: tuple[str, ...]
    outside: tuple[str, ...]
    front: str
    serves: bool
    follows: bool
    is_peer: bool
    peers: tuple[str, ...]
    partners: tuple[str, ...]
    head: str
    nodes: tuple[str, ...]
    head_address: str

    @property
    def shared(self) -> bool:
        """Whether several hosts share the model."""
        return len(self.nodes) > 1


def topology(host: str, groups: Mapping[str, Sequence[str]], value_of: Callable[[str, str], str]) -> Topology:
    """Return what the inventory makes of a host; of none in particular if `host` is empty.

    `value_of(HOST, VARIABLE)` is asked for `vllm_head` and `vllm_peer_address`, and returns nothing for what is not set. A wrong `vllm_head` is no error here:
    the role vllm's check says so in a sentence.
    """
    grouped = "inference" in groups
    everyone = tuple(groups.get(GROUP, groups["all"] if grouped or len(groups["all"]) == 1 else ()))
    followers = tuple(groups.get("followers", ()))
    servers = tuple(groups["inference"]) if grouped else everyone
    outside = tuple(name for name in everyone if name not in (*servers, *followers))
    front = next(iter((*outside, *servers)), "") if grouped else host
    apart = tuple(name for name in servers if name != front) if grouped else ()
    peers = apart if host == front else ()
    follows = host in followers
    head = value_of(host, "vllm_head") if follows else host
    nodes = (head, *(name for name in followers if value_of(name, "vllm_head") == head)) if host else ()
    return Topology(
        host=host,
        stack=tuple(dict.fromkeys((*everyone, *servers, *followers))),
        fronts=(front,) if grouped else everyone,
        servers=servers,
        apart=apart,
        followers=followers,
        outside=outside,
        front=front,
        # In a play of a user's own, which says itself what its hosts are, a host that is in no group is a stack of its own.
        serves=host in servers if grouped else bool(host) and not follows,
        follows=follows,
        is_peer=host in apart,
        peers=peers,
        partners=(front,) if host in apart else peers,
        head=head,
        nodes=nodes,
        head_address=value_of(head, "vllm_peer_address") if len(nodes) > 1 else "",
    )


def read(variables: Mapping[str, Any]) -> Topology:
    """Return the topology that Ansible's variables describe, as a lookup plugin gets them. A play's `hosts` are evaluated without hosts' variables."""
    hostvars = variables.get("hostvars", {})

    def value_of(host: str, name: str) -> str:
        return str(hostvars[host].get(name, "")) if host in hostvars else ""

    return topology(str(variables.get("inventory_hostname", "")), variables["groups"], value_of)
