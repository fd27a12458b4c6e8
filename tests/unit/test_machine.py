"""What the demo and the tests take over from the machine's own pip settings."""

from __future__ import annotations

from pathlib import Path

from machine import machine_variables


def test_plain_machine_needs_nothing(tmp_path: Path) -> None:
    assert machine_variables({}, {}, tmp_path) == {"agent_stack_pip_conf": str(tmp_path / "pip.conf")}
    assert "index-url" not in (tmp_path / "pip.conf").read_text()


def test_proxy_mirror_and_wheels_are_taken_over(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_text("x")
    settings = {"index-url": "https://mirror.example/simple", "find-links": f"https://x.example {tmp_path}"}
    assert machine_variables(settings, {"PIP_CERT": str(certificate)}, tmp_path) == {
        "agent_stack_pip_conf": str(tmp_path / "pip.conf"),
        "agent_stack_ca_certificates": [str(certificate)],
        "agent_stack_wheel_dir": str(tmp_path),
    }
    assert "index-url = https://mirror.example/simple" in (tmp_path / "pip.conf").read_text()


def test_certificate_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    assert "agent_stack_ca_certificates" not in machine_variables({}, {"SSL_CERT_FILE": "/nowhere"}, tmp_path)
