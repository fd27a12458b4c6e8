"""`python -m agent.healthcheck [PORT]`: the container's health check, with nothing but the standard library."""

import http.client
import sys


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError as error:
        raise SystemExit(f"agent: no answer: {error}") from None
    if status != http.client.OK:
        raise SystemExit(f"agent: status {status}")


if __name__ == "__main__":
    main()
