# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules that judge a server say of `golden_prompts`; plugins/module_utils/_vllm_judge.py has the option itself."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  golden_prompts:
    description: Questions of your own that the model must answer as you expect, at temperature 0. Asked last, and only while all is well.
    type: list
    elements: dict
    default: []
    suboptions:
      prompt:
        description: What to ask.
        type: str
        required: true
      expect:
        description: Regular expression that the answer must contain. Upper and lower case are the same.
        type: str
        required: true
      max_tokens:
        description: Most tokens to generate.
        type: int
        default: 64
      seconds:
        description: Most seconds that the answer may take. 0 means that only O(timeout) counts.
        type: float
        default: 0
"""
