"""The one way to make a Redis client: bounded in connections and time, with no command that the ACL does not allow."""

from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.credentials import CredentialProvider

from agent.settings import Settings

REDIS_SECONDS = 0.5


class Credentials(CredentialProvider):
    """The user and the password that counts when a connection is opened. While it is rotated, the server takes the one before it as well."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def get_credentials(self) -> tuple[str, str]:
        return self._settings.redis_user, self._settings.redis_password.get_secret_value()

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


def create_redis(settings: Settings, *, connections: int = 16, seconds: float = REDIS_SECONDS, blocking: bool = False) -> "Redis":
    """A client that has connected to nothing yet.

    `seconds` bound the wait for a free connection, for the server's acceptance and for an answer. The answer to a
    blocking command may come later; its caller bounds it.
    """
    answer: dict[str, Any] = {} if blocking else {"socket_timeout": seconds}
    return Redis.from_pool(
        BlockingConnectionPool(
            host=settings.redis_host,
            port=settings.redis_port,
            credential_provider=Credentials(settings),
            max_connections=connections,
            timeout=seconds,
            socket_connect_timeout=seconds,
            socket_keepalive=True,
            # These two keep the commands to the few that the ACL allows.
            protocol=2,
            driver_info=None,
            **answer,
        )
    )
