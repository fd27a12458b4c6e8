#!/usr/bin/env python3
"""Say as JSON what is on this host: files, packages, units, users, groups, networks and what listens.

Runs on the host, before the stack comes and after it went. What changes by itself is left out: logs, caches of apt and of the name service, /run, and
what Ansible leaves in root's home.
"""

import hashlib
import json
import os
import stat
import subprocess
import sys

# Below these nothing is looked at: the kernel's, and what every run of apt, systemd or Ansible writes to.
LEFT_OUT = {
    *("/dev", "/proc", "/run", "/sys", "/tmp", "/var/tmp"),
    *("/root/.ansible", "/root/.ansible_async", "/root/.cache", "/root/.docker"),
    *("/var/cache/apt", "/var/cache/debconf", "/var/cache/ldconfig", "/var/lib/apt", "/var/lib/dpkg", "/var/lib/systemd", "/var/log"),
    # A volume with the images of other test hosts in it, before there is an engine.
    "/var/lib/docker",
}
# Written anew from what else is compared.
DERIVED = {
    "/etc/ld.so.cache",
    "/etc/mtab",
    "/etc/.updated",
    "/var/.updated",
    "/etc/group-",
    "/etc/gshadow-",
    "/etc/passwd-",
    "/etc/shadow-",
    "/etc/resolv.conf",
}


def lines(*command):
    """Return what a program says, line by line, in alphabetical order."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return sorted(result.stdout.splitlines())


def files():
    """Return kind, mode, owner and content of every file, by path. A mount point is an empty directory or it is not."""
    found = {}
    for directory, directories, names in os.walk("/"):
        directories[:] = [name for name in directories if os.path.join(directory, name) not in LEFT_OUT and name != "__pycache__"]
        for name in [*directories, *names]:
            path = os.path.join(directory, name)
            if path in DERIVED:
                continue
            try:
                status = os.lstat(path)
                kind = stat.filemode(status.st_mode)
                what = ""
                if stat.S_ISLNK(status.st_mode):
                    what = os.readlink(path)
                elif stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as stream:
                        what = hashlib.sha256(stream.read()).hexdigest()
                found[path] = f"{kind} {status.st_uid}:{status.st_gid} {what}"
            except FileNotFoundError:
                continue
    return found


def main():
    """Print all of it."""
    json.dump(
        {
            "files": files(),
            "packages": lines("dpkg-query", "--show", "--showformat", "${db:Status-Abbrev} ${Package}\\n"),
            "units": lines("systemctl", "list-unit-files", "--plain", "--no-legend"),
            "failed": lines("systemctl", "--failed", "--plain", "--no-legend"),
            "users": lines("getent", "passwd"),
            "groups": lines("getent", "group"),
            "networks": [line.split(":")[1].strip().partition("@")[0] for line in lines("ip", "-oneline", "link")],
            "listening": sorted({" ".join(line.split()[:5:4]) for line in lines("ss", "--listening", "--tcp", "--numeric", "--no-header")}),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
