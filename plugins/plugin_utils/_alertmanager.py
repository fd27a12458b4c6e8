# Copyright: the selfhosted.agent_stack maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Alertmanager's configuration from the list of receivers. PRIVATE to the collection: it may change at any time.

A receiver has a name, and either one of TYPES with its settings, or `*_configs` in Alertmanager's own words. The configuration holds the receivers'
secrets, so it is one itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

HEARTBEAT = "watchdog"
NOBODY = "none"
SEVERITIES = ("critical", "warning")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
ADDRESS = re.compile(r"[^@\s,]+@[^@\s,]+")
HOST_AND_PORT = re.compile(r"[A-Za-z0-9.-]+:\d{1,5}")
# What a mobile phone shows of a group of alerts.
TITLE = '{{ if eq .Status "firing" }}{{ .Alerts.Firing | len }} firing{{ else }}resolved{{ end }}: {{ .GroupLabels.alertname }}'
TEXT = "{{ range .Alerts }}{{ .Annotations.summary }}\n{{ .Annotations.description }}\n{{ .Annotations.runbook_url }}\n{{ end }}"
# ntfy fills in its own template, from the same message that any webhook gets.
NTFY = {
    "tpl": "1",
    "t": "{{.groupLabels.alertname}} ({{.status}})",
    "m": "{{range .alerts}}{{.annotations.summary}}\n{{.annotations.description}}\n{{end}}",
}


class ReceiverError(ValueError):
    """The list of receivers cannot be used; the message is for the user."""


@dataclass(frozen=True)
class Type:
    """A kind of receiver: the settings that it needs, those that it may have, and which of them are secrets."""

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()


TYPES = {
    "email": Type(("to", "from", "smarthost"), ("username", "password", "require_tls"), ("password",)),
    "slack": Type(("url",), ("channel",), ("url",)),
    "webhook": Type(("url",), ("token",), ("url", "token")),
    "ntfy": Type(("url",), ("token",), ("url", "token")),
    "telegram": Type(("token", "chat_id"), ("url",), ("token",)),
    "pagerduty": Type(("routing_key",), ("url",), ("routing_key",)),
}


def configuration(receivers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what Alertmanager reads. Raises ReceiverError."""
    check(receivers)
    made: list[dict[str, Any]] = [{"name": NOBODY}]
    for receiver in receivers:
        if "type" in receiver:
            made.append({"name": receiver["name"], **MAKERS[receiver["type"]](receiver)})
        else:
            made.append({name: value for name, value in receiver.items() if name != "severities"})
    names = [receiver["name"] for receiver in receivers]
    heartbeat = {
        "receiver": HEARTBEAT if HEARTBEAT in names else NOBODY,
        "matchers": ['alertname="Watchdog"'],
        "group_wait": "0s",
        "group_interval": "1m",
        "repeat_interval": "5m",
    }
    routes = [
        {
            "receiver": receiver["name"],
            # Without a choice also what a user's own rules call otherwise.
            "matchers": [f'severity=~"{"|".join(receiver["severities"])}"' if "severities" in receiver else 'alertname!="Watchdog"'],
            "continue": True,
        }
        for receiver in receivers
        if receiver["name"] != HEARTBEAT
    ]
    return {
        "route": {
            "receiver": NOBODY,
            "group_by": ["alertname", "host"],
            "group_wait": "30s",
            "group_interval": "5m",
            "repeat_interval": "4h",
            "routes": [heartbeat, *routes],
        },
        "inhibit_rules": INHIBITIONS,
        "receivers": made,
    }


# What explains the other: whoever hears of the first need not hear of the second.
INHIBITIONS: list[dict[str, Any]] = [
    {"source_matchers": ['alertname="HostDown"'], "target_matchers": ['alertname!="HostDown"'], "equal": ["host"]},
    {"source_matchers": ['alertname="ModelDown"'], "target_matchers": ['alertname=~"ModelAway|ModelStalled|ModelQueueGrows"']},
    {"source_matchers": ['alertname=~"ModelFirstTokenSlow|ModelTokensSlow"'], "target_matchers": ['alertname="ModelLatencyHigh"'], "equal": ["model_name"]},
    {"source_matchers": ['alertname="PostgresDown"'], "target_matchers": ['alertname="AgentNotReady"', 'dependency="postgres"']},
    {"source_matchers": ['alertname="RedisDown"'], "target_matchers": ['alertname="AgentNotReady"', 'dependency="redis"']},
    {"source_matchers": ['alertname=~"ModelAway|ModelDown"'], "target_matchers": ['alertname="AgentNotReady"', 'dependency="model"']},
    {"source_matchers": ['alertname="AgentErrorsHigh"'], "target_matchers": ['alertname=~"TurnsFail|AvailabilityBurnsFast|AvailabilityBurnsSlowly"']},
    {"source_matchers": ['alertname="AvailabilityBurnsFast"'], "target_matchers": ['alertname="AvailabilityBurnsSlowly"'], "equal": ["kind"]},
    {"source_matchers": ['alertname="DiskAlmostFull"'], "target_matchers": ['alertname="DiskFullInADay"'], "equal": ["mountpoint"]},
]


def check(receivers: list[Mapping[str, Any]]) -> None:
    """Raises ReceiverError for a list that Alertmanager would refuse, or with which alerts would reach nobody."""
    names: list[str] = []
    for number, receiver in enumerate(receivers, 1):
        name = receiver.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == NOBODY:
            raise _error(f"has the name {name!r} at place {number}", 'letters, digits, ".", "_" and "-", and not "none"')
        if name in names:
            raise _error(f"has the name {name} twice", "different names")
        names.append(name)
        _check_one(name, receiver)
    for severity in SEVERITIES if receivers else ():
        if not any(severity in _severities(receiver) for receiver in receivers if receiver["name"] != HEARTBEAT):
            raise _error(
                f"has {', '.join(names)}, and none of them gets alerts of the severity {severity}",
                f'an empty list, or a receiver (not "{HEARTBEAT}") for each of {" and ".join(SEVERITIES)}',
            )


def _check_one(name: str, receiver: Mapping[str, Any]) -> None:
    given = receiver.get("severities", list(SEVERITIES))
    if not isinstance(given, list) or not given or not set(given) <= set(SEVERITIES):
        raise _error(f"has severities {given!r} at {name}", f"a list of {' and '.join(SEVERITIES)}")
    own = [key for key in receiver if key.endswith("_configs")]
    if ("type" in receiver) == bool(own):
        raise _error(
            f"has {', '.join(own) or 'nothing to send with'}{' and a type' if own else ''} at {name}", f"a type, one of {', '.join(TYPES)}, or *_configs"
        )
    if own:
        unknown = set(receiver) - {"name", "severities", *own}
        if unknown:
            raise _error(f"has {', '.join(sorted(unknown))} at {name}", "name, severities and *_configs")
        if not all(isinstance(receiver[key], list) and receiver[key] for key in own):
            raise _error(f"has an empty {', '.join(own)} at {name}", "a list with an entry")
        return
    if receiver["type"] not in TYPES:
        raise _error(f"has the type {receiver['type']!r} at {name}", f"one of {', '.join(TYPES)}")
    kind = TYPES[receiver["type"]]
    settings = {key for key in receiver if key not in {"name", "type", "severities"}}
    missing, unknown = set(kind.needs) - settings, settings - {*kind.needs, *kind.may}
    if missing:
        raise _error(f"lacks {', '.join(sorted(missing))} at {name}", f"{', '.join(kind.needs)} for the type {receiver['type']}")
    if unknown:
        raise _error(f"has {', '.join(sorted(unknown))} at {name}", f"{', '.join((*kind.needs, *kind.may))} for the type {receiver['type']}")
    for key in sorted(settings):
        _check_value(name, key, receiver[key], secret=key in kind.secrets)


def _check_value(name: str, key: str, value: Any, *, secret: bool) -> None:
    shown = "a value that is not shown" if secret else repr(value)
    if key == "url" and not (isinstance(value, str) and _is_address(value)):
        raise _error(f"has {shown} as {key} at {name}", "an address that begins with http:// or https://")
    if key in {"to", "from"} and not (isinstance(value, str) and ADDRESS.fullmatch(value)):
        raise _error(f"has {shown} as {key} at {name}", "one e-mail address")
    if key == "smarthost" and not (isinstance(value, str) and HOST_AND_PORT.fullmatch(value)):
        raise _error(f"has {shown} as {key} at {name}", "host:port")
    if key == "chat_id" and not re.fullmatch(r"-?\d{1,20}", str(value)):
        raise _error(f"has {shown} as {key} at {name}", "a whole number")
    if key == "require_tls" and not isinstance(value, bool):
        raise _error(f"has {shown} as {key} at {name}", "true or false")
    if key in {"password", "token", "routing_key", "username", "channel"} and not (isinstance(value, str) and re.fullmatch(r"[^\x00-\x1f\x7f]+", value)):
        raise _error(f"has {shown} as {key} at {name}", "a text of one line")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0) and not re.search(r"\s", text)
    except ValueError:
        return False


def _error(what: str, allowed: str) -> ReceiverError:
    return ReceiverError(f"monitoring_alert_receivers {what}; allowed: {allowed}.")


def _severities(receiver: Mapping[str, Any]) -> list[str]:
    return list(receiver.get("severities", SEVERITIES))


def _email(given: Mapping[str, Any]) -> dict[str, Any]:
    config = {"to": given["to"], "from": given["from"], "smarthost": given["smarthost"], "send_resolved": True}
    config["require_tls"] = given.get("require_tls", True)
    if "username" in given:
        config["auth_username"] = given["username"]
    if "password" in given:
        config["auth_password"] = given["password"]
    return {"email_configs": [config]}


def _slack(given: Mapping[str, Any]) -> dict[str, Any]:
    config = {"api_url": given["url"], "send_resolved": True, "title": TITLE, "text": TEXT}
    return {"slack_configs": [{**config, **({"channel": given["channel"]} if "channel" in given else {})}]}


def _webhook(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"webhook_configs": [{"url": given["url"], "send_resolved": True, **_bearer(given)}]}


def _ntfy(given: Mapping[str, Any]) -> dict[str, Any]:
    address = f"{given['url']}{'&' if '?' in given['url'] else '?'}{urlencode(NTFY)}"
    return {"webhook_configs": [{"url": address, "send_resolved": True, **_bearer(given)}]}


def _bearer(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"http_config": {"authorization": {"credentials": given["token"]}}} if "token" in given else {}


def _telegram(given: Mapping[str, Any]) -> dict[str, Any]:
    # As plain text: a "<" or "_" in an alert is no markup.
    config = {"bot_token": given["token"], "chat_id": int(given["chat_id"]), "parse_mode": "", "message": f"{TITLE}\n{TEXT}"}
    return {"telegram_configs": [{**config, "send_resolved": True, **({"api_url": given["url"]} if "url" in given else {})}]}


def _pagerduty(given: Mapping[str, Any]) -> dict[str, Any]:
    config = {"routing_key": given["routing_key"], "send_resolved": True, "severity": "{{ .CommonLabels.severity }}"}
    return {"pagerduty_configs": [{**config, **({"url": given["url"]} if "url" in given else {})}]}


MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "email": _email,
    "slack": _slack,
    "webhook": _webhook,
    "ntfy": _ntfy,
    "telegram": _telegram,
    "pagerduty": _pagerduty,
}
