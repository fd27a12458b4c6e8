# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Give the module vllm_plan the collection's catalogue, vLLM's list of parsers and the program that asks vLLM.

The contract is in plugins/modules/vllm_plan.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from ansible.plugins.action import ActionBase

ROLE = Path(__file__).resolve().parents[2] / "roles" / "vllm"


def catalogue(*, with_shapes: bool) -> dict[str, Any]:
    """Return the catalogue, and with each model of it its config.json where that is needed."""
    found: dict[str, Any] = yaml.safe_load((ROLE / "vars" / "catalogue.yml").read_text())["__vllm_catalogue"]
    if with_shapes:
        for entry in found["models"]:
            entry["config"] = json.loads((ROLE / "files" / "models" / f"{entry['shape']}.json").read_text())
    return found


class ActionModule(ActionBase):
    """The files lie on the controller, and the plan is made where the GPUs are."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        arguments.setdefault("catalogue", catalogue(with_shapes=bool(arguments.get("suggest_for"))))
        arguments.setdefault("asker", (ROLE / "files" / "ask_vllm.py").read_text())
        arguments.setdefault("registry", json.loads((ROLE / "files" / "vllm-registry.json").read_text())["cuda"])
        result.update(self._execute_module(module_name="selfhosted.agent_stack.vllm_plan", module_args=arguments, task_vars=task_vars))
        return result
