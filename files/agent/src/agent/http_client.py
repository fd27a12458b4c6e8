"""The one way to make a general HTTP client. The model and fetched pages have one of their own (wire.py)."""

import httpx


def create_client(
    headers: dict[str, str] | None = None,
    timeout: httpx.Timeout | float | None = None,
    auth: httpx.Auth | None = None,
) -> httpx.AsyncClient:
    """A client that talks to the configured address alone: no proxy of the environment, and no redirect.

    The parameters and their order are those that an MCP client asks of a factory.
    """
    return httpx.AsyncClient(headers=headers, timeout=timeout, auth=auth, trust_env=False, follow_redirects=False)
