"""The figures of bench/gpu_host.sh: from logs as they are written, into one object a machine, and into the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

gpu_host = load("bench/gpu_host.py")

SWAP = """\
TASK [selfhosted.agent_stack.vllm : Swap | Have the model serve] ***************
  load       35.1 s   requests held: 8, failed: 0
  sleep       9.6 s   requests held: 8, failed: 0
  falling asleep    9.7 s   requests held: 8, failed: 0
  load       82.3 s   requests held: 8, failed: 0
  flip        0.1 s   requests held: 0, failed: 0

TASK [selfhosted.agent_stack.vllm : Swap | Say what it was] ********************
ok: [a] =>
    msg: /srv/models/next serves in green. Requests were held for 92.9 s, 8 at most at one time; 0 failed. start, sleep, load, flip

PLAY RECAP *********************************************************************
a                          : ok=70   changed=3    unreachable=0    failed=0    skipped=38   rescued=0    ignored=0
gpu_host: 131.4 s, status 0
"""
FAILED = """\
PLAY RECAP *********************************************************************
a                          : ok=12   changed=0    unreachable=0    failed=1    skipped=2    rescued=0    ignored=0
gpu_host: 9.0 s, status 2
"""
TWO_HOSTS = """\
PLAY RECAP *********************************************************************
a                          : ok=70   changed=1    unreachable=0    failed=0    skipped=38   rescued=0    ignored=0
b                          : ok=70   changed=2    unreachable=0    failed=0    skipped=38   rescued=0    ignored=0
"""


@pytest.mark.parametrize(
    ("read", "log", "expected"),
    [
        ("held", SWAP, 92.9),
        ("held", SWAP.replace("Requests were held", "Requests were\n      held"), 92.9),
        ("held", SWAP + SWAP.replace("92.9", "1.8"), 1.8),
        ("held", "", None),
        ("phases", SWAP, {"load": 82.3, "sleep": 9.6, "falling asleep": 9.7, "flip": 0.1}),
        ("phases", "", {}),
        ("changed", SWAP, 3),
        ("changed", TWO_HOSTS, 3),
        ("changed", SWAP.replace("changed=3 ", "changed=0 "), 0),
        ("changed", FAILED, None),
        ("changed", "", None),
        ("took", SWAP, 131.4),
        ("took", FAILED, None),
        ("took", "", None),
    ],
)
def test_what_a_log_says(read: str, log: str, expected: Any) -> None:
    assert getattr(gpu_host, read)(log) == expected


def line(through: str, clients: int, rate: float, first: float, **more: Any) -> dict[str, Any]:
    result = {"clients": clients, "answers": 10, "failed": 0, "tokens": 1000, "tokens_per_s": rate, "first_token_p50_s": first}
    before = {"agent-stack-agent-agent-1": 5_000, "nginx": 1_000}
    after = {"agent-stack-agent-agent-1": 505_000, "nginx": 41_000}
    return {"through": through, "result": result | more, "cpu_before": before, "cpu_after": after}


def test_the_share_is_the_agents_rate_over_the_models() -> None:
    figures = gpu_host.share([line("vllm", 64, 8000, 0.050), line("agent", 64, 7600, 0.062)])
    assert figures["agent_share_64"] == 0.95
    assert figures["first_token_added_ms_64"] == 12
    assert figures["cpu_us_a_token_64"] == {"nginx": 40, "agent": 500, "gateway": 0, "postgres": 0, "redis": 0}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line("vllm", 64, 8000, 0.05)],
        [line("agent", 64, 8000, 0.05)],
        [line("vllm", 64, 8000, 0.05), line("agent", 16, 8000, 0.05)],
        [line("vllm", 64, 8000, 0.05), line("agent", 64, 7600, 0.06, failed=1)],
        [line("vllm", 64, 8000, 0.05), {"through": "agent", "result": {"clients": 64, "answers": 0, "failed": 64}}],
    ],
)
def test_half_a_comparison_is_none(lines: list[dict[str, Any]]) -> None:
    assert "agent_share_64" not in gpu_host.share(lines)


def write(directory: Path, **files: str) -> Path:
    directory.mkdir()
    for name, text in files.items():
        (directory / name.replace("__", ".").replace("_", "-")).write_text(text)
    return directory


NOTES = '{"gpu": "NVIDIA H200"}\n{"gpus": 1}\n{"watchdog_answer_seconds": 80.1}\n{"watchdog_answer_seconds": null}\n{"cores": 16}\n'


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    assert gpu_host.record(write(tmp_path / "out", notes__jsonl=NOTES)) == {"gpu": "NVIDIA H200", "gpus": 1, "cores": 16}


def test_a_whole_record(tmp_path: Path) -> None:
    load_result = '{"clients": 8, "answers": 1226, "failed": 0, "longest_s": 93.4}'
    out = write(
        tmp_path / "out", notes__jsonl=NOTES, second__log=SWAP, swap_never__log=SWAP.replace("92.9", "40.2"), rollback__log=SWAP, swaps__json=load_result
    )
    (out / "share.jsonl").write_text("\n".join(json.dumps(one) for one in [line("vllm", 256, 8000, 0.05), line("agent", 256, 7200, 0.05)]))
    figures = gpu_host.record(out, write(tmp_path / "base", notes__jsonl=NOTES, swap_never__log=SWAP))
    expected = {"second_run_changed": 3, "hold_seconds": 40.2, "baseline_hold_seconds": 92.9, "hold_ratio": 0.43, "rollback_seconds": 92.9}
    expected |= {"failed": 0, "requests": 1226, "longest_wait_seconds": 93.4, "agent_share_256": 0.9}
    assert {key: figures.get(key) for key in expected} == expected


def test_a_baseline_of_another_gpu_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out", notes__jsonl=NOTES, swap_never__log=SWAP)
    base = write(tmp_path / "base", notes__jsonl=NOTES.replace("H200", "H100"), swap_never__log=SWAP)
    with pytest.raises(gpu_host.RecordError, match="of NVIDIA H100; allowed is a directory of NVIDIA H200"):
        gpu_host.record(out, base)


def test_a_directory_of_no_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_host.main(["record", str(tmp_path), "--json", str(tmp_path / "gpu.json")]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_recording_again_renews_what_was_measured_again() -> None:
    machines = [{"gpu": "H200", "gpus": 1, "hold_seconds": 90, "failed": 0}, {"gpu": "H100", "hold_seconds": 70}]
    merged = gpu_host.merge(machines, {"gpu": "H200", "gpus": 1, "hold_seconds": 40})
    assert merged == [{"gpu": "H200", "gpus": 1, "hold_seconds": 40, "failed": 0}, {"gpu": "H100", "hold_seconds": 70}]
    assert gpu_host.merge(merged, {"gpu": "H200", "gpus": 2, "hold_seconds": 50})[2:] == [{"gpu": "H200", "gpus": 2, "hold_seconds": 50}]


def test_the_table() -> None:
    machines = [{"gpu": "H200", "gpus": 1, "hold_seconds": 92.9, "requests": 1226, "agent_share_64": 0.951}, {"gpu": "H100", "gpus": 2, "hold_seconds": 70.0}]
    assert gpu_host.render(machines).splitlines() == [
        "| | H200 | 2 H100 |",
        "|---|---|---|",
        "| requests during the swaps | 1,226 |  |",
        "| swap to a model never loaded: held | 92.9 s | 70.0 s |",
        "| share at 64 | 95.1 % |  |",
    ]


def test_only_the_part_between_the_marks_changes() -> None:
    document = f"# GPUs\n\n{gpu_host.BEGIN}\nold\n{gpu_host.END}\n\nmore\n"
    assert gpu_host.insert(document, "new\n") == f"# GPUs\n\n{gpu_host.BEGIN}\n\nnew\n\n{gpu_host.END}\n\nmore\n"
    with pytest.raises(gpu_host.RecordError, match="lacks"):
        gpu_host.insert("# GPUs\n", "new\n")


def test_the_document_is_what_the_figures_say() -> None:
    document = (ROOT / "docs/measurements/gpu.md").read_text()
    assert gpu_host.insert(document, gpu_host.render(json.loads((ROOT / "docs/measurements/gpu.json").read_text()))) == document
