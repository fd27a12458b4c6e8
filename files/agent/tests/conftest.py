from collections.abc import Callable, Iterator

import pytest

from servers import Agent, Model, Postgres, Redis, environment, migrate

# What a test with one of these fixtures waits for.
SERVERS = {"postgres", "redis", "model_process"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "server: talks to Postgres, Redis or the scripted model server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    server = Redis()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def model_process() -> Iterator[Model]:
    server = Model()
    yield server
    server.remove()


@pytest.fixture
def model(model_process: Model) -> Iterator[Model]:
    model_process.control(clear=True)
    yield model_process
    if model_process.process is None:
        model_process.start()
    model_process.control(clear=True)


@pytest.fixture(scope="session")
def migrated(postgres: Postgres, redis: Redis, model_process: Model) -> Postgres:
    run = migrate(environment(postgres, redis, model_process, postgres.directory))
    assert run.returncode == 0, run.stderr
    return postgres


@pytest.fixture(scope="session")
def agent_process(migrated: Postgres, redis: Redis, model_process: Model) -> Iterator[Agent]:
    service = Agent(migrated, redis, model_process)
    service.start()
    yield service
    service.remove()


@pytest.fixture
def agent(agent_process: Agent, model: Model) -> Agent:
    """The service with everything in order around it."""
    return agent_process


@pytest.fixture
def start_agent(migrated: Postgres, redis: Redis, model: Model) -> Iterator[Callable[..., Agent]]:
    """Start a service of the test's own, with these settings."""
    started: list[Agent] = []

    def start(**settings: str) -> Agent:
        service = Agent(migrated, redis, model, **settings)
        started.append(service)
        service.start()
        return service

    yield start
    for service in started:
        service.remove()


@pytest.fixture(scope="module")
def pair_processes(migrated: Postgres, redis: Redis, model_process: Model) -> Iterator[tuple[Agent, Agent]]:
    services = [Agent(migrated, redis, model_process, AGENT_TURN_TIMEOUT_SECONDS="20") for _ in range(2)]
    yield services[0], services[1]
    for service in services:
        service.remove()


@pytest.fixture
def pair(pair_processes: tuple[Agent, Agent], agent_process: Agent, model: Model) -> Iterator[tuple[Agent, Agent]]:
    """Two services, both alive, whatever the test before has done to them.

    The service of the other tests shares their database: it is frozen, or it would take over what they leave.
    """
    for service in pair_processes:
        if service.process is None or service.process.poll() is not None:
            service.start()
    agent_process.freeze()
    yield pair_processes
    agent_process.thaw()
