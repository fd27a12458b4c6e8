# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup plugin: Alertmanager's configuration from a list of receivers."""

from __future__ import annotations

DOCUMENTATION = r"""
name: alertmanager
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
version_added: 0.2.0
short_description: Alertmanager's configuration from a list of receivers
description:
  - Makes routes, inhibitions and receivers of C(monitoring_alert_receivers).
  - Fails with one sentence for a list with which alerts would reach nobody, or that Alertmanager would refuse.
options:
  _terms:
    description: One list of receivers, as the role C(monitoring) documents it.
    required: true
"""

EXAMPLES = r"""
- name: Show what Alertmanager would read
  ansible.builtin.debug:
    msg: "{{ lookup('selfhosted.agent_stack.alertmanager', monitoring_alert_receivers) }}"
"""

RETURN = r"""
_raw:
  description: One mapping, the configuration. It holds the receivers' secrets.
  type: list
  elements: dict
"""

from typing import Any  # noqa: E402

from ansible.errors import AnsibleError  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402

from ..plugin_utils import _alertmanager  # noqa: E402


class LookupModule(LookupBase):
    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[Any]:
        self.set_options(var_options=variables, direct=kwargs)
        try:
            return [_alertmanager.configuration(terms[0])]
        except _alertmanager.ReceiverError as error:
            raise AnsibleError(str(error)) from error
