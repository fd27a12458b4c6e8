# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the module vllm_swap apart from the connection, and show where it is; see plugins/modules/vllm_swap.py for the contract."""

from __future__ import annotations

import os
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

MODULE = "selfhosted.agent_stack.vllm_swap"
# Longer than any model takes to load. It only ends a job that nobody would ever end.
JOB_SECONDS = 86400
SHOW_SECONDS = 5
# Looks at a job that do not find it, one after the other.
PATIENCE = 10

display = Display()


class Shown:
    """Says of each phase how long it took, and of one that takes long, how long so far."""

    def __init__(self) -> None:
        self.ended = 0
        self.last = time.monotonic()

    def show(self, progress: dict[str, Any]) -> None:
        current, phases = progress.get("current"), progress.get("phases", [])
        if not current:
            return
        self._show_ended(phases[:-1], current["held"], current["failed"])
        if time.monotonic() - self.last >= SHOW_SECONDS:
            self._line(current["phase"], current["seconds"], current["held"], current["failed"])

    def rest(self, outcome: dict[str, Any]) -> None:
        self._show_ended(outcome.get("phases", []), 0, outcome.get("failed_requests", 0))

    def _show_ended(self, phases: list[dict[str, Any]], held: int, failed: int) -> None:
        for phase in phases[self.ended :]:
            self._line(phase["phase"], phase["seconds"], held, failed)
        self.ended = max(self.ended, len(phases))

    def _line(self, phase: str, seconds: float, held: int, failed: int) -> None:
        display.display(f"  {phase:<8} {seconds:6.1f} s   requests held: {held}, failed: {failed}")
        self.last = time.monotonic()


class ActionModule(ActionBase):
    """What takes time is a job on the host: a swap that has begun ends well, or is undone, also when the controller goes away."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        if arguments.get("state") in ("status", "prepared") or self._task.check_mode:
            result.update(self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars))
            return result
        first = self._execute_module(module_name=MODULE, module_args=arguments | {"at_once": True}, task_vars=task_vars)
        if first.get("failed") or not first.get("pending"):
            result.update(first)
        else:
            result.update(self._watch(arguments, task_vars))
        return result

    def _watch(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        self._task.async_val = JOB_SECONDS
        job = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars, wrap_async=True)
        self._task.async_val = 0
        if job.get("failed") or "ansible_job_id" not in job:
            return dict(job)
        where = {"jid": job["ansible_job_id"], "_async_dir": os.path.dirname(job["results_file"])}
        asking = {key: arguments[key] for key in ("root", "data") if key in arguments} | {"state": "status"}
        shown = Shown()
        unknown = 0
        while True:
            outcome = self._execute_module(module_name="ansible.legacy.async_status", module_args=where, task_vars=task_vars)
            status = self._execute_module(module_name=MODULE, module_args=asking, task_vars=task_vars)
            shown.show(status.get("progress", {}))
            if outcome.get("finished"):
                break
            # Its file is written anew while the job runs, and once may be met half written.
            unknown = unknown + 1 if "finished" not in outcome else 0
            if unknown == PATIENCE:
                said = outcome.get("msg") or "nothing"
                return {
                    "failed": True,
                    "msg": f"the swap's process on the host does not say any more how it is ({said}); run the play again, which ends or undoes it",
                }
            time.sleep(0.5)
        shown.rest(outcome)
        self._execute_module(module_name="ansible.legacy.async_status", module_args=where | {"mode": "cleanup"}, task_vars=task_vars)
        return {key: value for key, value in outcome.items() if key not in ("ansible_job_id", "results_file", "started", "finished")}
