"""A throw-away server for `make demo` and molecule: a container that runs systemd, and Docker inside it.

Standard library only, because it also works before the virtual environment exists.

    python3 tools/host/host.py up NAME [--domain DOMAIN] [--publish 127.0.0.1:8443:443] [--with-docker] [--images-of NAME]
    python3 tools/host/host.py down NAME [--keep-images] [--keep-volume]
    python3 tools/host/host.py engine        # make sure that a Docker engine answers
    python3 tools/host/host.py image         # make the image of a bare host, which `up` makes otherwise
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCKERD_LOG = Path("/var/log/agent-stack-test-dockerd.log")
LABEL = "org.agent-stack.test-host"
BASE = "agent-stack-test/base:trixie"
# `--privileged` asks for CAP_SYS_RESOURCE, which an unprivileged or nested engine cannot give.
RUN_FLAGS = [
    "--cap-add=ALL",
    "--cap-drop=SYS_RESOURCE",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    "--cgroupns=host",
    "--tmpfs=/run",
    "--tmpfs=/run/lock",
    "--tmpfs=/tmp",
    "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw",
]
# As the role `docker` installs them.
DOCKER_PACKAGES = "docker.io docker-cli docker-compose docker-buildx"
# Fails in every container, because modules are the kernel's affair.
UNITS_THAT_MAY_FAIL = {"systemd-modules-load.service"}


class HostError(Exception):
    """Something about the machine or the test host; the message is for the user."""


def run(*command: str, check: bool = True, stdin: str | None = None) -> str:
    """Run a command and return its output; raise HostError with the last lines of it."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)
    except OSError as error:
        raise HostError(f"`{command[0]}` cannot be run: {error.strerror}.") from error
    if check and result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-20:])
        raise HostError(f"`{' '.join(command[:6])} ...` exited with {result.returncode}:\n{tail}")
    return result.stdout.strip()


def engine() -> None:
    """Make sure that a Docker engine answers: install Debian's and start it where we are root, else say what is missing."""
    if _engine_answers():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise HostError("No Docker engine answers `docker info`. Start Docker, or run this as root on Debian or Ubuntu, where it installs one.")
    if shutil.which("dockerd") is None:
        print("installing the Docker engine", flush=True)
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-y", "-q", "--no-install-recommends", "docker.io", "iptables")
    daemon = None
    if Path("/run/systemd/system").is_dir():
        run("systemctl", "start", "docker")
    else:
        # No init system to keep it: a session of its own lets the daemon outlive this program.
        with DOCKERD_LOG.open("ab") as log:
            daemon = subprocess.Popen(["dockerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    for _ in range(60):
        if _engine_answers():
            return
        if daemon and daemon.poll() is not None:
            break
        time.sleep(1)
    log_lines = DOCKERD_LOG.read_text(errors="replace").splitlines()[-20:] if DOCKERD_LOG.exists() else ["None: see `journalctl -u docker`."]
    raise HostError("\n".join(["The Docker engine was started, but does not answer `docker info`. Its last log lines:", *log_lines]))


def up(name: str, domain: str, publish: list[str], with_docker: bool = False, images_of: str = "") -> bool:
    """Start the host, bare or with Docker installed, or leave a running one alone. Return whether it was started.

    A new host begins with the container images that the host `images_of` had when it went, if that kept its volume.
    """
    engine()
    state = run("docker", "container", "inspect", "--format", "{{.State.Status}}", name, check=False)
    if state and state != "running":
        run("docker", "container", "start", name)
    if not state:
        image = _image(DOCKER_PACKAGES if with_docker else "")
        ports = [f"--publish={port}" for port in publish]
        if images_of and run("docker", "volume", "ls", "--quiet", "--filter", f"name=^{_volume(images_of)}$"):
            _copy_images(_volume(images_of), _volume(name), image)
        run(
            *("docker", "run", "--detach", "--name", name, "--hostname", name, "--label", f"{LABEL}={name}"),
            *("--add-host", f"{domain}:127.0.0.1", "--volume", f"{_volume(name)}:/var/lib/docker"),
            *(*RUN_FLAGS, *ports, image),
        )
    _wait_for_systemd(name)
    return state != "running"


def down(name: str, keep_images: bool = False, keep_volume: bool = False) -> None:
    """Remove the host, its volume unless other hosts shall begin with the images in it, and the images of test hosts unless the next one needs them."""
    if shutil.which("docker") is None:
        return
    if not _engine_answers():
        raise HostError(f"No Docker engine answers `docker info`, so it is not known whether it keeps the test host {name}. Start Docker and repeat this.")
    if keep_volume:
        # Its engine ends in order: what is copied later must be whole.
        run("docker", "container", "stop", name, check=False)
    run("docker", "container", "rm", "--force", "--volumes", name, check=False)
    if not keep_volume:
        run("docker", "volume", "rm", "--force", _volume(name), check=False)
    if not keep_images and not run("docker", "container", "ls", "--all", "--quiet", "--filter", f"label={LABEL}"):
        images = run("docker", "image", "ls", "--quiet", "--filter", "reference=agent-stack-test/*")
        for image in dict.fromkeys(images.split()):
            run("docker", "image", "rm", "--force", image, check=False)


def _copy_images(source: str, target: str, image: str) -> None:
    """Fill a new volume with the images of another one.

    Layers are never written to once they are there, so both have the same files. What the engine writes to in place is copied.
    """
    run("docker", "volume", "create", target)
    paths = run("docker", "volume", "inspect", "--format", "{{.Mountpoint}}", source, target).split()
    # Under one mount, because there is no link from one mount to another.
    parent = os.path.commonpath(paths)
    source, target = (os.path.join("/volumes", os.path.relpath(path, parent)) for path in paths)
    script = f"cd {source} && cp --archive --link overlay2 {target}/ && for one in *; do [ $one = overlay2 ] || cp --archive $one {target}/; done"
    run("docker", "run", "--rm", "--volume", f"{parent}:/volumes", "--entrypoint", "sh", image, "-ec", script)


def _volume(name: str) -> str:
    """The volume that holds the images and containers of a host's own engine."""
    return f"{name}-docker"


def _engine_answers() -> bool:
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def _image(packages: str) -> str:
    digest = hashlib.sha256(packages.encode())
    for path in sorted(HERE.rglob("*")):
        if path.is_file() and path.suffix not in {".py", ".pyc"}:
            digest.update(path.relative_to(HERE).as_posix().encode() + path.read_bytes())
    image = f"agent-stack-test/host:{digest.hexdigest()[:12]}"
    if not run("docker", "image", "ls", "--quiet", image):
        _base()
        print("building the image of the test host", flush=True)
        run("docker", "build", "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", f"PACKAGES={packages}", "--tag", image, str(HERE))
    return image


def _base() -> None:
    """Make the base image from Debian packages where we are root on Debian or Ubuntu, else pull it."""
    if run("docker", "image", "ls", "--quiet", BASE):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        run("docker", "pull", "docker.io/library/debian:trixie-slim")
        run("docker", "tag", "docker.io/library/debian:trixie-slim", BASE)
        return
    if shutil.which("mmdebstrap") is None:
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-y", "-q", "--no-install-recommends", "mmdebstrap", "debian-archive-keyring")
    print("making a Debian base image", flush=True)
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    # In a mount namespace of its own: mmdebstrap would leave this machine's / a private mount.
    # The host is thrown away, so its dpkg need not wait for the disk.
    hook = "--customize-hook='echo force-unsafe-io > \"$1\"/etc/dpkg/dpkg.cfg.d/test-host'"
    pipe = f"set -o pipefail; unshare --mount mmdebstrap --quiet --variant=minbase {hook} --keyring={keyring} trixie - | docker import - {BASE}"
    run("bash", "-c", pipe)


def _wait_for_systemd(name: str) -> None:
    for _ in range(400):
        state = run("docker", "exec", name, "systemctl", "is-system-running", check=False)
        if state in {"running", "degraded"}:
            failed = run("docker", "exec", name, "systemctl", "--failed", "--plain", "--no-legend", check=False)
            units = {line.split()[0] for line in failed.splitlines() if line.strip()}
            if units - UNITS_THAT_MAY_FAIL:
                raise HostError(f"In the test host {name} these units failed: {', '.join(sorted(units - UNITS_THAT_MAY_FAIL))}.")
            return
        time.sleep(0.5)
    raise HostError(f"systemd in the test host {name} is not up after 200 s.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser("up")
    up_parser.add_argument("name")
    up_parser.add_argument("--domain", default="agent.localhost")
    up_parser.add_argument("--publish", action="append", default=[])
    up_parser.add_argument("--with-docker", action="store_true")
    up_parser.add_argument("--images-of", default="")
    down_parser = commands.add_parser("down")
    down_parser.add_argument("name")
    down_parser.add_argument("--keep-images", action="store_true")
    down_parser.add_argument("--keep-volume", action="store_true")
    commands.add_parser("engine")
    commands.add_parser("image")
    arguments = parser.parse_args()
    try:
        if arguments.command == "up":
            up(arguments.name, arguments.domain, arguments.publish, arguments.with_docker, arguments.images_of)
        elif arguments.command == "down":
            down(arguments.name, arguments.keep_images, arguments.keep_volume)
        elif arguments.command == "image":
            engine()
            _image("")
        else:
            engine()
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
