"""Run vLLM as one of several hosts that share a model. Standard library only; it runs inside vLLM's container.

    node.py serve  ADDRESS COMMAND ...              the head: vLLM listens for requests on /run/vllm/api.sock
    node.py follow ADDRESS HEAD PORT COMMAND ...    a follower: vLLM runs as long as the head does

ADDRESS is this host's, by which the others reach it, HEAD the head's, PORT where the head's vLLM waits for the others.

A follower's vLLM does not notice that the head is gone, and keeps its GPUs. So it is ended when the head's is. Waiting costs no GPU
memory: the followers of all models that a swap may go back to wait at the same time, each for its own port.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import signal
import socket
import struct
import subprocess
import sys
import time

SOCKET = "/run/vllm/api.sock"
SIOCGIFADDR = 0x8915
LOOK_SECONDS = float(os.environ.get("NODE_LOOK_SECONDS", "2"))
GRACE_SECONDS = 30
# A head whose power was cut says no goodbye: seconds until it is asked for a sign of life, between two such questions, and how many it may miss.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an address. Exits with a sentence if none has."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        with open("/proc/net/if_inet6") as lines:
            names = {ipaddress.ip_address(int(line.split()[0], 16)): line.split()[5] for line in lines}
    else:
        names = {}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _index, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    names[ipaddress.ip_address(answer[20:24])] = name
    if wanted not in names:
        sys.exit(f"error: no network interface of this host has the address {address}, which is its vllm_peer_address")
    return names[wanted]


def reach(host: str, port: int) -> socket.socket | None:
    """Return a connection to what listens there, or nothing. It is not used; that it ends tells that the process at the other end has."""
    try:
        connection = socket.create_connection((host, port), 5)
    except OSError:
        return None
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setblocking(False)
    return connection


def ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def follow(head: str, port: int, command: list[str]) -> None:
    """Run the command once the head is there, until one of them ends. Docker then starts the container again, with whatever GPU it may have lost."""
    running: list[subprocess.Popen[bytes]] = []

    def stop(*_: object) -> None:
        for process in running:
            end(process)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"waiting for the head at {head}:{port}", flush=True)
    while (connection := reach(head, port)) is None:
        time.sleep(LOOK_SECONDS)
    print("the head is there", flush=True)
    process = subprocess.Popen(command, start_new_session=True)
    running.append(process)
    while process.poll() is None and not ended(connection):
        time.sleep(LOOK_SECONDS)
    print("the head is gone" if process.returncode is None else f"vLLM ended with {process.returncode}", flush=True)
    end(process)


def main() -> None:
    role, address, *rest = sys.argv[1:]
    name = interface_of(address)
    # By itself each library looks for an address in another way, and on many hosts finds that of the loopback interface.
    os.environ.update(VLLM_HOST_IP=address, GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=f"={name}")
    if role == "follow":
        head, port, *command = rest
        follow(head, int(port), command)
        return
    # The socket of a killed process would be in the way. Whoever may enter its directory may use it.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(SOCKET)
    os.umask(0)
    os.execvp(rest[0], rest)  # noqa: S606  it becomes vLLM


if __name__ == "__main__":
    main()
