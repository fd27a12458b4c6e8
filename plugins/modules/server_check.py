#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: can this server carry the stack as it is?"""

from __future__ import annotations

DOCUMENTATION = r"""
module: server_check
short_description: Look at a server before anything changes, and say all that keeps the stack from running on it
version_added: 0.2.0
description:
  - Reads distribution, systemd, Docker and its settings, apt's sources and locks, ports and who holds them, disks, memory, routes, clock, proxy settings,
    nginx's sites and the GPU's driver, in one go, and judges them.
  - What the stack cannot live with is an answer, not a failure - RV(refused) has one sentence for each thing, with what to do about it.
  - How to install Docker beside what is there is in RV(docker). Nothing is changed and nothing is installed.
options:
  paths:
    description: Directories that the stack writes to. They need not be there yet.
    type: list
    elements: path
    default: []
  ports:
    description:
      - Ports that the stack listens on. Each has C(port), C(reach) - V(loopback), V(peers) or V(all) - and C(variable), the name of the setting that
        moves it, or an empty one.
    type: list
    elements: dict
    default: []
  docker:
    description: Whether the host needs Docker.
    type: bool
    default: true
  docker_package_source:
    description: Where Docker comes from where there is none, as the role C(docker) has it.
    type: str
    choices: [auto, distribution, docker]
    default: auto
  docker_daemon_options:
    description: Keys that are wanted in C(/etc/docker/daemon.json).
    type: dict
    default: {}
  docker_daemon_hardening:
    description: Keys that are wanted there as well, if the engine is the stack's.
    type: dict
    default: {}
  stack:
    description: Directory of the stack, which says what was on the host before it.
    type: path
    default: ""
  subnets:
    description: Address ranges of the stack's networks by the network's name, where Docker shall not choose.
    type: dict
    default: {}
  mtu:
    description: Largest packet of the stack's networks, in bytes. 0 means that of an uplink that carries less than Ethernet, else Docker's own choice.
    type: int
    default: 0
  front:
    description: Whether the host carries all but the model.
    type: bool
    default: true
  nginx:
    description: Whether nginx of this host is the stack's entrance.
    type: bool
    default: false
  domain:
    description: Name under which the stack is reached. Empty means that DNS is not asked.
    type: str
    default: ""
  certificate:
    description: Where the certificate comes from, as the role C(nginx_certbot) has it.
    type: str
    default: self_signed
  gpu:
    description: Whether the host serves the model on a GPU.
    type: bool
    default: false
  cuda_version:
    description: CUDA that the driver must support.
    type: str
    default: "0"
  toolkit_version:
    description: Version of NVIDIA's toolkit that will be installed. Empty means any.
    type: str
    default: ""
  toolkit_packages:
    description: Names of the toolkit's packages.
    type: list
    elements: str
    default: []
  toolkit_repository:
    description: Address of the toolkit's repository. Other sources for it are in RV(toolkit_sources).
    type: str
    default: ""
  toolkit_source:
    description: The file with the role's own source for it.
    type: path
    default: ""
  model:
    description: The model to serve on this host. Empty means none.
    type: str
    default: ""
  model_directory:
    description: Where models are kept.
    type: path
    default: ""
  cpu_model:
    description: Whether the model is served on the CPU.
    type: bool
    default: false
  needs_way_out:
    description: Whether packages or images are fetched from other machines.
    type: bool
    default: true
  pulls:
    description: Whether Docker pulls images from a registry.
    type: bool
    default: false
  controller_time:
    description: The controller's time, in seconds since 1970. 0 means that the clock is not compared.
    type: float
    default: 0
attributes:
  check_mode:
    description: The module only reads.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Look at the server
  selfhosted.agent_stack.server_check:
    ports:
      - {port: 8080, reach: loopback, variable: agent_port}
  register: server

- name: Stop where the stack cannot run
  ansible.builtin.assert:
    that: server.refused | length == 0
    fail_msg: "{{ server.refused | join('\n') }}"
"""

RETURN = r"""
refused:
  description: What the stack cannot live with, a sentence or two each. Empty if the host will do.
  returned: success
  type: list
  elements: str
  sample: ["Port 80 is taken by apache2 (process 812, apache2.service). Stop that, or have it listen elsewhere: nginx of the stack needs this port."]
notes:
  description: What is worth knowing, and does not stop a play.
  returned: success
  type: list
  elements: str
  sample: ["agent.example.com has no address in DNS yet. Until it leads to this host, the certificate authority gives no certificate."]
docker:
  description: How Docker is brought to what the stack needs.
  returned: success
  type: dict
  sample: {"packages": [], "repository": false, "options": {"live-restore": true}}
  contains:
    packages:
      description: Packages to install. Empty if the engine is used as it is.
      type: list
      elements: str
    repository:
      description: Whether Docker's own repository has to be added for them.
      type: bool
    options:
      description: The part of O(docker_daemon_options) and O(docker_daemon_hardening) that this engine can live with.
      type: dict
network_mtu:
  description: Largest packet of the stack's networks, in bytes; 0 for Docker's own choice.
  returned: success
  type: int
  sample: 0
ipv6_only:
  description: Whether IPv6 is the host's one way out.
  returned: success
  type: bool
  sample: false
toolkit_sources:
  description: Files with other sources for NVIDIA's container packages than O(toolkit_source).
  returned: success
  type: list
  elements: str
  sample: ["/etc/apt/sources.list.d/nvidia-container-toolkit.list"]
facts:
  description: What was read, for people and reports. It may change with any version.
  returned: success
  type: dict
  sample: {"platform": "Debian 13"}
"""

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _apt_sources, _server_facts, _server_rules  # noqa: E402


def main() -> None:
    texts = ("domain", "toolkit_version", "toolkit_repository", "model")
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "default": []},
            "ports": {"type": "list", "elements": "dict", "default": []},
            "docker": {"type": "bool", "default": True},
            "docker_package_source": {"type": "str", "choices": ["auto", "distribution", "docker"], "default": "auto"},
            "docker_daemon_options": {"type": "dict", "default": {}},
            "docker_daemon_hardening": {"type": "dict", "default": {}},
            "subnets": {"type": "dict", "default": {}},
            "mtu": {"type": "int", "default": 0},
            "front": {"type": "bool", "default": True},
            "certificate": {"type": "str", "default": "self_signed"},
            "cuda_version": {"type": "str", "default": "0"},
            "toolkit_packages": {"type": "list", "elements": "str", "default": []},
            "needs_way_out": {"type": "bool", "default": True},
            "controller_time": {"type": "float", "default": 0},
            **{name: {"type": "str", "default": ""} for name in texts},
            **{name: {"type": "path", "default": ""} for name in ("toolkit_source", "model_directory", "stack")},
            **{name: {"type": "bool", "default": False} for name in ("nginx", "gpu", "cpu_model", "pulls")},
        },
        supports_check_mode=True,
    )
    settings = dict(module.params)
    facts = _server_facts.gather(settings)
    toolkit = _apt_sources.toolkit_files(facts["sources"], settings["toolkit_repository"], settings["toolkit_source"])
    settings["replaced_sources"] = toolkit if settings["gpu"] else []
    refused, notes = _server_rules.judge(facts, settings)
    module.exit_json(
        changed=False,
        refused=refused,
        notes=notes,
        docker=_server_rules.docker_plan(facts, settings).as_dict(),
        network_mtu=_server_rules.network_mtu(facts, settings["mtu"]),
        ipv6_only=_server_rules.ipv6_only(facts),
        toolkit_sources=toolkit,
        facts=_server_facts.shown(facts),
    )


if __name__ == "__main__":
    main()
