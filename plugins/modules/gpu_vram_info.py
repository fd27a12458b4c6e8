#!/usr/bin/python
# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Module: what GPUs a host has, and how much of their memory is free."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_vram_info
short_description: Tell what NVIDIA GPUs a host has and how much of their memory is free
version_added: 0.2.0
description:
  - Asks NVML through the Python package C(nvidia-ml-py) where the host has it, and C(nvidia-smi) otherwise. Nothing is installed.
  - A host without a GPU, without a driver or with one that does not work is an answer, not a failure - RV(state) says which.
  - Compare total memory with what a model needs when a play checks its host. On a second run the model itself holds the free memory.
options:
  executable:
    description: The C(nvidia-smi) to run where NVML's Python package is missing. A name is looked up on the PATH.
    type: str
    default: nvidia-smi
  timeout:
    description: Time for each of the two ways to answer, in seconds. A driver that hangs is left behind after that.
    type: int
    default: 20
attributes:
  check_mode:
    description: The module only reads.
    support: full
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
"""

EXAMPLES = r"""
- name: Ask for the GPUs
  selfhosted.agent_stack.gpu_vram_info:
  register: gpu

- name: Stop on a host whose driver is too old for the image's CUDA
  ansible.builtin.assert:
    that: gpu.state == 'present' and gpu.cuda_version is version('13.0', '>=')
    fail_msg: "{{ gpu.reason or 'the driver supports CUDA ' ~ gpu.cuda_version ~ ', the image needs 13.0' }}"
"""

RETURN = r"""
state:
  description: V(present) if there is at least one GPU, V(absent) if there is none or no driver, V(broken) if a driver is there and does not work.
  returned: success
  type: str
  sample: present
reason:
  description: Why no GPU is reported. Empty if RV(state) is V(present).
  returned: success
  type: str
  sample: ""
source:
  description: Who answered - V(nvml), V(nvidia-smi) or V(none).
  returned: success
  type: str
  sample: nvml
driver_version:
  description: Version of the driver.
  returned: success
  type: str
  sample: 580.159.04
cuda_version:
  description: Newest CUDA that the driver supports.
  returned: success
  type: str
  sample: "13.0"
gpus:
  description: One entry for each GPU.
  returned: success
  type: list
  elements: dict
  sample: []
  contains:
    index:
      description: Number of the GPU, from 0.
      type: int
      sample: 0
    name:
      description: What it is called.
      type: str
      sample: NVIDIA H100 80GB HBM3
    uuid:
      description: Its identifier, which survives a reboot.
      type: str
      sample: GPU-2f3d0c9a-6a1e-4c2b-9a63-0c7d3f7a9b11
    compute_capability:
      description: Major and minor version of its architecture.
      type: str
      sample: "9.0"
    total_mib:
      description: All its memory, in MiB. 0 if it shares the host's memory and does not say.
      type: int
      sample: 81559
    used_mib:
      description: Memory that programs hold, in MiB.
      type: int
      sample: 0
    free_mib:
      description: Memory that a program could still get, in MiB.
      type: int
      sample: 81079
    reserved_mib:
      description: Memory that the driver keeps for itself, in MiB. Programs see C(total_mib) less this. 0 if the driver does not say.
      type: int
      sample: 480
    processes:
      description: Programs that compute on it, with C(pid), C(name) and C(used_mib). Those of other containers may be missing.
      type: list
      elements: dict
      sample: []
    mig_mode:
      description: V(enabled), V(disabled) or V(unsupported).
      type: str
      sample: disabled
    mig_devices:
      description: Its MIG instances, with C(uuid), C(name) and their memory in MiB.
      type: list
      elements: dict
      sample: []
"""

import shutil  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.selfhosted.agent_stack.plugins.module_utils import _nvml  # noqa: E402


def main() -> None:
    module = AnsibleModule(
        argument_spec={"executable": {"type": "str", "default": "nvidia-smi"}, "timeout": {"type": "int", "default": 20}},
        supports_check_mode=True,
    )
    if module.params["timeout"] < 1:
        module.fail_json(msg=f"timeout is {module.params['timeout']}; allowed is 1 second and more.")
    report = _nvml.gpu_report(shutil.which(module.params["executable"]), module.params["timeout"])
    module.exit_json(changed=False, **report)


if __name__ == "__main__":
    main()
