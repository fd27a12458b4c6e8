"""What uv is told of a pip.conf when the image of vLLM for CPUs is built."""

from __future__ import annotations

import subprocess
import sys
from configparser import Error
from pathlib import Path

import pytest
from programs import ROOT, load

PROGRAM = "files/images/vllm-cpu/uv_settings.py"
settings = load(PROGRAM).settings
BUNDLE = {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt"}


@pytest.mark.parametrize(
    ("pip_conf", "environment"),
    [
        ("", {}),
        ("[global]\n", {}),
        ("[global]\nindex-url = https://user:p%40ss@mirror.example/simple\n", {"UV_DEFAULT_INDEX": "https://user:p%40ss@mirror.example/simple"}),
        ("[global]\nindex_url = https://a.example\n[install]\nindex-url = https://b.example\n", {"UV_DEFAULT_INDEX": "https://b.example"}),
        (
            "[global]\nextra-index-url =\n    https://a.example\n    https://b.example\n",
            {"UV_INDEX": "https://a.example https://b.example", "UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        ("[global]\nfind-links = /a\n  https://b.example/c\n", {"UV_FIND_LINKS": "/a,https://b.example/c"}),
        ("[global]\ntrusted-host = a.example b.example:8443\n", {"UV_INSECURE_HOST": "a.example b.example:8443"}),
        ("[global]\ncert = /etc/ca.pem\nclient-cert = /etc/me.pem\n", {"SSL_CERT_FILE": "/etc/ca.pem", "SSL_CLIENT_CERT": "/etc/me.pem"}),
        ("[global]\nproxy = http://proxy.example:3128\ntimeout = 60\n", {"ALL_PROXY": "http://proxy.example:3128", "UV_HTTP_TIMEOUT": "60"}),
        ("[global]\nno-index = true\n", {"UV_NO_INDEX": "true"}),
        ("[global]\nindex-url =\nquiet = 1\n[freeze]\ntimeout = 10\n", {}),
    ],
)
def test_each_setting_has_its_name(pip_conf: str, environment: dict[str, str]) -> None:
    assert settings(pip_conf) == BUNDLE | environment


def test_what_is_no_pip_conf_fails() -> None:
    with pytest.raises(Error):
        settings("index-url = https://a.example\n")


def test_a_shell_gets_the_values_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://a.example/$(id)/'x y'\n")
    script = f'eval "$({sys.executable} {ROOT / PROGRAM} {tmp_path}/pip.conf)" && printf %s "$UV_DEFAULT_INDEX"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == "https://a.example/$(id)/'x y'"
