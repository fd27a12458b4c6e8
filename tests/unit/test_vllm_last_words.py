"""What is said of a model server that ended, and which caches are removed."""

from __future__ import annotations

import pytest
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_host import last_words
from ansible_collections.selfhosted.agent_stack.plugins.module_utils._vllm_swap import Slot, Wish, unused_caches

START = "(APIServer pid=1) INFO 11-27 12:00:00 [api_server.py:1896] vLLM API server version 0.33.0\n"
END = (
    "(APIServer pid=1) Traceback (most recent call last):\n"
    + '(APIServer pid=1)   File "/usr/local/lib/vllm/entrypoints/cli/main.py", line 73, in main\n' * 60
    + "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
)
ENGINE = "(EngineCore_DP0 pid=215) ERROR 11-27 12:00:01 [core.py:866] "
WORKER = "(Worker_TP1 pid=301) ERROR 11-27 12:00:00 [multiproc_executor.py:597] "
API = "(APIServer pid=1) ERROR 11-27 11:59:59 [config.py:12] "
CAUSE = ["EngineCore failed to start.", "Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."]


def said(prefix: str, lines: list[str]) -> str:
    return "".join(f"{prefix}{line}\n" for line in lines)


HEADING = "The first error in its log (EngineCore_DP0 core.py:866):"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        pytest.param(START + said(ENGINE, CAUSE) + END, [HEADING, *CAUSE], id="the engine"),
        pytest.param(
            START + said(WORKER, ["WorkerProc failed to start.", "no NCCL"]) + said(ENGINE, CAUSE) + END,
            ["The first error in its log (Worker_TP1 multiproc_executor.py:597):", "WorkerProc failed to start.", "no NCCL"],
            id="a worker before the engine",
        ),
        pytest.param(said(API, ["a warning of sorts"]) + said(ENGINE, CAUSE) + END, [HEADING, *CAUSE], id="not what the API server says"),
        pytest.param(said(API, ["no such model"]), ["The first error in its log (APIServer config.py:12):", "no such model"], id="the API server alone"),
        pytest.param("ERROR 11-27 12:00:01 core.py:396] no memory\n" + END, ["The first error in its log (core.py:396):", "no memory"], id="an older vLLM"),
        pytest.param(
            said(ENGINE, [f"line {number}" for number in range(60)]) + END,
            [HEADING, *(f"line {number}" for number in range(4)), "...", *(f"line {number}" for number in range(45, 60))],
            id="a long traceback",
        ),
        pytest.param(
            "Traceback (most recent call last):\nKeyError: 'getpwuid(): uid not found: 10001'\n",
            ["Its last log lines:", "Traceback (most recent call last):", "KeyError: 'getpwuid(): uid not found: 10001'"],
            id="no error line",
        ),
        pytest.param("\n".join(map(str, range(100))), ["Its last log lines:", *map(str, range(60, 100))], id="the last lines"),
        pytest.param("", ["Its last log lines:"], id="an empty log"),
    ],
)
def test_the_cause_is_named(log: str, expected: list[str]) -> None:
    assert last_words(log).splitlines() == expected


def slot(cache: str | None) -> Slot:
    return Slot("m", "d", cache=cache)


@pytest.mark.parametrize(
    ("slots", "removed"),
    [
        pytest.param([slot("/c/one"), slot("/c/two")], ["/c/old"], id="both images are used"),
        pytest.param([slot("/c/one")], ["/c/two", "/c/old"], id="one image"),
        pytest.param([slot("")], ["/c/one", "/c/two", "/c/old"], id="a server without a cache"),
        pytest.param([slot("/c/one"), slot(None)], [], id="one of an older version"),
        pytest.param([], [], id="no model"),
    ],
)
def test_caches_that_no_slot_uses_are_removed(slots: list[Slot], removed: list[str]) -> None:
    assert unused_caches(["/c/one", "/c/two", "/c/old"], slots) == removed


@pytest.mark.parametrize(("volumes", "cache"), [([], ""), (["/m:/models:ro"], ""), (["/m:/models:ro", "/data/vllm-cache/ab:/cache"], "/data/vllm-cache/ab")])
def test_a_wish_knows_its_cache(volumes: list[str], cache: str) -> None:
    assert Wish("m", {"command": [], "volumes": volumes}).cache == cache
