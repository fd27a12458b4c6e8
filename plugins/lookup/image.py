# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lookup plugin: the image reference for a name."""

from __future__ import annotations

DOCUMENTATION = r"""
name: image
author:
  - The selfhosted.agent_stack maintainers (@selfhosted)
version_added: 0.1.0
short_description: The container image that stands for a name of the catalogue
description:
  - Decides from C(agent_stack_image_source), C(agent_stack_image_overrides) and C(agent_stack_image_contexts) which image a component uses.
  - The tag of an image that is built here is a digest of everything that goes into it, so a changed source is a new image
    and an unchanged one is never built twice.
options:
  _terms:
    description: Names of images that components declare in C(roles/*/meta/component.yml).
    required: true
  wants:
    description:
      - What to return. V(reference) is the image reference, V(origin) one of V(registry), V(build) and V(archive),
        V(base) the image that a build starts from, V(release) the Debian release in it, V(context) the directory on the controller with the build's sources,
        V(wheels) whether C(agent_stack_wheel_dir) is a part of these.
    type: str
    choices: [reference, origin, base, release, context, wheels]
    default: reference
"""

EXAMPLES = r"""
- name: Show the image
  ansible.builtin.debug:
    msg: "{{ lookup('selfhosted.agent_stack.image', 'redis') }}"
"""

RETURN = r"""
_raw:
  description: One string for each name.
  type: list
  elements: str
"""

import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.errors import AnsibleError  # noqa: E402
from ansible.plugins.lookup import LookupBase  # noqa: E402

from ..plugin_utils import _components, _images  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
DIGESTS = ROOT / "roles" / "agent_stack" / "files" / "image-digests.json"


class LookupModule(LookupBase):
    def run(self, terms: list[str], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[str]:
        self.set_options(var_options=variables, direct=kwargs)
        answer = getattr(_images, self.get_option("wants"))
        try:
            settings = self._settings(variables or {})
            return [str(answer(term, settings)) for term in terms]
        except (_components.ComponentError, _images.ImageError, OSError) as error:
            raise AnsibleError(str(error)) from error

    def _settings(self, variables: dict[str, Any]) -> _images.Settings:
        def value(name: str) -> Any:
            return self._templar.template(variables[name])

        components = _components.load(ROOT / "roles").values()
        return _images.Settings(
            catalogue=_components.images(components),
            base_images=_components.base_images(components),
            source=value("agent_stack_image_source"),
            collection_root=ROOT,
            digests=json.loads(DIGESTS.read_text()),
            overrides=value("agent_stack_image_overrides"),
            contexts=value("agent_stack_image_contexts"),
            archive_dir=value("agent_stack_image_archive_dir"),
            build_serial=value("agent_stack_build_serial"),
            debian_mirror=value("agent_stack_debian_mirror"),
            ca_certificates=tuple(value("agent_stack_ca_certificates")),
        )
