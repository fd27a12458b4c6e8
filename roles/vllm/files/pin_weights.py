"""What vLLM's workers get beside their own methods, with `--worker-extension-cls pin_weights.PinWeights`. It runs inside vLLM's container.

A sleep copies the weights to pinned memory of the host, which torch's allocator keeps afterwards. Taking it for the first time is what makes the first
sleep of a process slow: 10 s for 14 GiB, and 0.4 s from then on. So it is taken, and given back to torch's allocator, while the model serves.
"""

from __future__ import annotations

import threading
import time
from typing import Any

TAG = "weights"


class PinWeights:
    """vLLM calls a method of all workers at once, by its name, through `/collective_rpc`."""

    _pinning: threading.Thread | None = None
    _pin_error = ""

    def pin_weights(self) -> dict[str, Any]:
        """Begin to pin in the background, or look how far that is. Return `done`, and `error`, which is empty if all went well."""
        if self._pinning is None:
            self._pinning = threading.Thread(target=self._pin, daemon=True)
            self._pinning.start()
        return {"done": not self._pinning.is_alive(), "error": self._pin_error}

    def _pin(self) -> None:
        try:
            take(weights())
        except Exception as error:  # whatever it is: the model serves on, and its first sleep is a slow one
            self._pin_error = f"{type(error).__name__}: {error}"


def weights() -> list[int]:
    """Return the bytes of each piece of memory that a sleep copies."""
    from vllm.device_allocator.cumem import CuMemAllocator  # type: ignore[import-not-found,unused-ignore]

    return [int(data.handle[1]) for data in list(CuMemAllocator.get_instance().pointer_to_data.values()) if data.tag == TAG]


def take(sizes: list[int]) -> None:
    """Have torch's allocator hold pinned pieces of all sizes at once; each that is given back is found again by the next one of its size.

    While the driver pins a piece the GPU gets no new work, so the engine has as much time after each as that took.
    """
    import torch  # type: ignore[import-not-found,unused-ignore]

    pieces = []
    for size in sizes:
        begun = time.monotonic()
        pieces.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True))
        time.sleep(time.monotonic() - begun)
