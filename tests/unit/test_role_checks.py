"""What the roles without a test of their own refuse before anything changes, each with a sentence; ranges and passwords have one check for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT

GOOD = "a good password"
SHARED: dict[str, Any] = {
    "ansible_connection": "local",
    "ansible_python_interpreter": sys.executable,
    "agent_stack_secure_logging": False,
    "agent_stack_domain": "agent.example.com",
    "agent_stack_email": "ops@example.com",
    "nginx_certbot_proxy_secret": "s" * 32,
    **dict.fromkeys(("nginx_certbot_password", "postgres_agent_password", "postgres_backup_cipher_pass", "postgres_exporter_password"), GOOD),
    **dict.fromkeys(("redis_agent_password", "redis_exporter_password"), GOOD),
    "agent_stack_image_source": "build",
    "agent_stack_image_overrides": {},
    "agent_stack_secrets": {"monitoring_grafana_password": GOOD},
}
ROLES = ("postgres", "redis", "nginx_certbot", "logrotate", "firewall", "host", "monitoring")
S3 = {
    "postgres_backup_s3_endpoint": "s3.example.com:9000",
    "postgres_backup_s3_bucket": "backups",
    "postgres_backup_s3_key": "key",
    "postgres_backup_s3_key_secret": "a/secret+=",
}
SFTP = {
    "postgres_backup_sftp_host": "backup.example.com",
    "postgres_backup_sftp_user": "agent",
    "postgres_backup_sftp_host_fingerprint": "0f" * 32,
    "postgres_backup_sftp_private_key_file": __file__,
}
HOOK = {"name": "ops", "type": "webhook", "url": "https://chat.example.com/x"}
TAKEN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "least": {"redis_maxmemory_mib": 16, "postgres_max_connections": "20", "logrotate_keep": 1, "host_journal_max_mib": 64},
    "most": {"redis_maxmemory_mib": 65536, "postgres_max_connections": 10000, "nginx_certbot_read_timeout_seconds": 3600},
    "ports": {
        "firewall_tcp_ports": [1, 65535, "8080"],
        "firewall_ssh_ports": [2222],
        "firewall_trusted_networks": ["192.0.2.7", "10.0.0.0/8", "fd00::/8", "::1"],
    },
    "no backup": {"postgres_backup_repository": "none"},
    "s3": {"postgres_backup_repository": "s3", **S3},
    "sftp": {"postgres_backup_repository": "sftp", **SFTP},
    "watched": {
        "monitoring_alert_receivers": [HOOK, {**HOOK, "name": "watchdog"}, {"name": "own", "email_configs": [{"to": "ops@example.com"}]}],
        "monitoring_extra_scrape_configs": [{"job_name": "nas", "static_configs": [{"targets": ["192.0.2.10:9100"]}]}],
        "monitoring_availability_goal": 0.999,
        "monitoring_probe_address": "",
    },
    "half": {"postgres_memory_limit_mib": 256, "postgres_shared_buffers_mib": 128},
}
BAD_PORTS = [
    ("firewall_tcp_ports", 0, "0"),
    ("firewall_tcp_ports", 65536, "65536"),
    ("firewall_udp_ports", "80-90", '"80-90"'),
    ("firewall_ssh_ports", -1, "-1"),
    ("firewall_ssh_ports", "22 }", '"22 }"'),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"redis_maxmemory_mib": 15}, "redis_maxmemory_mib is 15; allowed is a whole number from 16 to 65536."),
    ({"redis_maxmemory_mib": 65537}, "redis_maxmemory_mib is 65537; allowed is a whole number from 16 to 65536."),
    ({"postgres_max_connections": 19}, "postgres_max_connections is 19; allowed is a whole number from 20 to 10000."),
    ({"postgres_memory_limit_mib": 256, "postgres_shared_buffers_mib": 129}, "postgres_shared_buffers_mib is 129; allowed is a whole number from 16 to 128."),
    ({"postgres_backup_cipher_pass": "short"}, "postgres_backup_cipher_pass has 5 characters; allowed are at least 12"),
    ({"postgres_backup_keep_full": 0}, "postgres_backup_keep_full is 0; allowed is a whole number from 1 to 1000."),
    ({"postgres_backup_wal_queue_mib": 63}, "postgres_backup_wal_queue_mib is 63; allowed is a whole number from 64 to 1048576."),
    ({"postgres_backup_directory": "backups"}, 'postgres_backup_directory is "backups"; with postgres_backup_repository=directory allowed is an absolute path'),
    (
        {"agent_stack_data_dir": "/srv/data", "postgres_backup_directory": "/srv/data/postgres/backups"},
        'postgres_backup_directory is "/srv/data/postgres/backups"; allowed is a directory outside the cluster\'s, which a restore replaces.',
    ),
    ({"postgres_backup_stanza": "a]\nb"}, 'postgres_backup_stanza is "a]\\nb"; with postgres_backup_repository=directory allowed is a name of 1 to 32'),
    ({"postgres_backup_schedule": "at night"}, 'postgres_backup_schedule is "at night" and postgres_backup_drill_schedule "Sun *-*-* 05:00:00"; allowed are'),
    (
        {"postgres_backup_repository": "s3", **S3, "postgres_backup_s3_endpoint": "https://s3.example.com"},
        'postgres_backup_s3_endpoint is "https://s3.example.com"; with postgres_backup_repository=s3 allowed is a server\'s name or address',
    ),
    (
        {"postgres_backup_repository": "s3", **S3, "postgres_backup_s3_bucket": ""},
        'postgres_backup_s3_bucket is ""; with postgres_backup_repository=s3 allowed is a bucket\'s name',
    ),
    (
        {"postgres_backup_repository": "s3", **S3, "postgres_backup_s3_key_secret": ""},
        "postgres_backup_s3_key_secret has 0 characters; allowed are one or more",
    ),
    (
        {"postgres_backup_repository": "sftp", **SFTP, "postgres_backup_sftp_host_fingerprint": "SHA256:abc"},
        'postgres_backup_sftp_host_fingerprint is "SHA256:abc"; with postgres_backup_repository=sftp allowed is the SHA-256 digest',
    ),
    (
        {"postgres_backup_repository": "sftp", **SFTP, "postgres_backup_sftp_private_key_file": "/absent"},
        'postgres_backup_sftp_private_key_file is "/absent"; allowed is a file on the controller.',
    ),
    ({"host_journal_max_mib": 63}, "host_journal_max_mib is 63; allowed is a whole number from 64 to 102400."),
    ({"logrotate_keep": 366}, "logrotate_keep is 366; allowed is a whole number from 1 to 365."),
    ({"nginx_certbot_more_domains": ["Chat.example.com"]}, 'nginx_certbot_more_domains is ["Chat.example.com"]. Allowed: up to 99 host names'),
    ({"nginx_certbot_more_domains": ["agent.example.com"]}, 'nginx_certbot_more_domains is ["agent.example.com"]. Allowed: up to 99 host names'),
    ({"nginx_certbot_more_domains": ["a.example.com; root /"]}, 'nginx_certbot_more_domains is ["a.example.com; root /"]. Allowed:'),
    ({"nginx_certbot_certificate": "own"}, "nginx_certbot_own_certificate is ''. Allowed with nginx_certbot_certificate=own: the absolute path of"),
    (
        {"nginx_certbot_certificate": "own", "nginx_certbot_own_certificate": "/a.pem", "nginx_certbot_own_key": "key.pem"},
        "nginx_certbot_own_key is 'key.pem'. Allowed with nginx_certbot_certificate=own",
    ),
    ({"nginx_certbot_requests_per_second": 0}, "nginx_certbot_requests_per_second is 0; allowed is a whole number from 1 to 10000."),
    *(({name: [443, port]}, f"{name} is [443, {shown}]; allowed is a list of ports from 1 to 65535.") for name, port, shown in BAD_PORTS),
    *(
        ({"firewall_trusted_networks": [network]}, f'firewall_trusted_networks is ["{network}"]; allowed is a list of addresses and networks')
        for network in ("10.0.0.0/33", "256.1.1.1", "example.com", "10.0.0.0/8; drop", "fd00::/129", "", "10.0.0")
    ),
    ({"redis_agent_password": "short"}, "redis_agent_password has 5 characters; allowed are at least 12, none of them a control character."),
    ({"redis_exporter_password": ""}, "redis_exporter_password has 0 characters; allowed are at least 12"),
    ({"monitoring_alert_receivers": [{**HOOK, "name": "watchdog"}]}, "monitoring_alert_receivers has watchdog, and none of them gets alerts of the severity"),
    ({"monitoring_alert_receivers": [{"name": "ops", "type": "pigeon"}]}, "monitoring_alert_receivers has the type 'pigeon' at ops; allowed: one of email,"),
    ({"monitoring_availability_goal": 1}, "monitoring_availability_goal is 1; allowed is from 0.9 to less than 1 (0.99 means 99 %)."),
    ({"monitoring_alert_gpu_celsius": 0}, "monitoring_alert_gpu_celsius is 0; allowed is more than 0."),
    ({"monitoring_alert_error_ratio": 5}, "monitoring_alert_error_ratio is 5; allowed is more than 0, up to 1 (0.9 means 90 %)."),
    ({"monitoring_probe_address": "example.com"}, "monitoring_probe_address is example.com; allowed is host-gateway, an IP address, or nothing to ask DNS."),
    ({"monitoring_runbook_url": "docs/runbook.md"}, "monitoring_runbook_url is docs/runbook.md; allowed is an address that begins with http:// or https://"),
    ({"monitoring_extra_scrape_configs": [{"job_name": "node"}]}, "monitoring_extra_scrape_configs has the jobs node; allowed are different names (job_name)"),
    ({"postgres_exporter_password": "two\nlines of it"}, "postgres_exporter_password has 15 characters; allowed are at least 12, none of them a control"),
]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a play over the roles' checks said, with one host for each case."""
    directory = tmp_path_factory.mktemp("checks")
    hosts = {**TAKEN, **{f"refused-{number}": values for number, (values, _) in enumerate(REFUSED)}}
    (directory / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": SHARED}}))
    tasks = [{"ansible.builtin.include_role": {"name": f"selfhosted.agent_stack.{role}", "tasks_from": "check"}} for role in ROLES]
    (directory / "play.yml").write_text(yaml.safe_dump([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(played: str, name: str) -> None:
    recap = played[played.index("PLAY RECAP") :]
    assert f"{name} : " in recap, played
    assert " failed=0 " in recap[recap.index(f"{name} : ") :].partition("ignored=")[0], played


@pytest.mark.parametrize(("number", "words"), [(number, words) for number, (_, words) in enumerate(REFUSED)], ids=lambda case: str(case)[:40])
def test_what_is_refused(played: str, number: int, words: str) -> None:
    recap = played[played.index("PLAY RECAP") :]
    assert " failed=1 " in recap[recap.index(f"refused-{number} : ") :].partition("ignored=")[0], played
    assert words in played, played
