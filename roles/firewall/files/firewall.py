"""Keep the stack's table of nftables in force. A systemd unit runs this.

    firewall.py apply DIRECTORY     put it in force, in one step
    firewall.py watch DIRECTORY     do so, and again whenever somebody took it away
    firewall.py state DIRECTORY     say whether what is in force is what the directory and SSH's ports make: `current` or `outdated`
    firewall.py ports               print the TCP ports of this host's SSH server, one a line

DIRECTORY holds containers.nft and, where the host itself is guarded, host.nft.

The table is the stack's own, so no reload of Docker, ufw or firewalld touches it. `nft flush ruleset`, with which /etc/nftables.conf begins, removes
every table: the kernel says so, and the table is back within a second.
"""

import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

NFT = "/usr/sbin/nft"
TABLE = ("inet", "agent_stack")
# What takes tables away may do so several times in a row.
PAUSE_SECONDS = 0.05


def output(*command: str) -> str:
    """What a program says, or nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def ssh_ports() -> list[int]:
    """The ports that SSH is configured to listen on, and 22: a port too many is harmless, one too few locks out."""
    configured = re.findall(r"(?m)^port (\d+)$|^listenaddress .*:(\d+)$", output("/usr/sbin/sshd", "-T"))
    # Where systemd listens for it.
    socket = re.findall(r":(\d+) \(Stream\)", output("systemctl", "show", "ssh.socket", "sshd.socket", "--property=Listen"))
    return sorted({22, *(int(one or other) for one, other in configured), *map(int, socket)})


def rules(directory: Path) -> str:
    """The rules, as a file of nft."""
    text = (directory / "containers.nft").read_text()
    host = directory / "host.nft"
    if host.exists():
        text += host.read_text() + "".join(f"add element {' '.join(TABLE)} ssh {{ {port} }}\n" for port in ssh_ports())
    return text


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def in_force() -> str:
    """The digest of the rules that the kernel has; empty where the table is not there."""
    table = subprocess.run([NFT, "list", "table", *TABLE], capture_output=True, text=True, check=False).stdout
    found = re.search(r'comment "([0-9a-f]{64})"', table)
    return found[1] if found else ""


def apply(directory: Path) -> None:
    """One transaction that replaces the table. Raises CalledProcessError."""
    text, name = rules(directory), " ".join(TABLE)
    # A table is removed only where it is there, and the digest is for `state`.
    whole = f'add table {name}\ndelete table {name}\ntable {name} {{ comment "{digest(text)}"; }}\n{text}'
    subprocess.run([NFT, "--file", "-"], input=whole, text=True, check=True)


def watch(directory: Path) -> None:
    # Listens before the first look, so that nothing falls between the two.
    # Not `monitor destroy tables`, which nft 1.1 takes for another command.
    with subprocess.Popen([NFT, "monitor", "tables"], stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        apply(directory)
        for event in monitor.stdout:
            # The kernel also says so when it could not tell everything.
            if not event.startswith("delete table") and "ERROR" not in event:
                continue
            time.sleep(PAUSE_SECONDS)
            if not in_force():
                print(f"the table {' '.join(TABLE)} was removed; it is put in force again", flush=True)
                apply(directory)
    sys.exit("nft monitor ended")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["apply", directory]:
            apply(Path(directory))
        case ["watch", directory]:
            watch(Path(directory))
        case ["state", directory]:
            print("current" if in_force() == digest(rules(Path(directory))) else "outdated")
        case ["ports"]:
            print(*ssh_ports(), sep="\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
