"""Print the settings of a pip.conf as exports for a shell, in uv's names: uv installs faster, but reads no pip.conf.

    eval "$(python3 uv_settings.py /etc/pip.conf)"

pip's sections `global` and `install` count, the second over the first. A certificate authority that pip.conf does not name
is the system's. Prints nothing else, raises configparser.Error for what is no pip.conf.
"""

import configparser
import shlex
import sys

# pip's name, uv's name. Of several values pip's are separated by blanks or lines, uv's by blanks.
NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "no-index": "UV_NO_INDEX",
}
SYSTEM = {"SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt"}


def settings(text: str) -> dict[str, str]:
    """The environment of uv for a pip.conf with this text."""
    parser = configparser.RawConfigParser()
    parser.read_string(text)
    found: dict[str, str] = {}
    for section in ("global", "install"):
        found |= dict(parser.items(section)) if parser.has_section(section) else {}
    # pip takes names with underscores too.
    found = {name.replace("_", "-"): " ".join(value.split()) for name, value in found.items()}
    environment = SYSTEM | {NAMES[name]: value for name, value in found.items() if name in NAMES and value}
    if "UV_FIND_LINKS" in environment:
        environment["UV_FIND_LINKS"] = environment["UV_FIND_LINKS"].replace(" ", ",")
    if "UV_INDEX" in environment:
        # As pip does it: the best match of all indexes. The locked hashes say what is taken.
        environment["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return environment


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        for name, value in settings(file.read()).items():
            print(f"export {name}={shlex.quote(value)}")
