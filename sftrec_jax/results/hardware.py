"""What a run ran on, without the name of the machine."""

import os
import platform
from pathlib import Path
from typing import Any

CPU_FILE = Path("/proc/cpuinfo")


def hardware() -> dict[str, Any]:
    """`cpu` (model, null where the system does not say), `cores` this process may use, `devices` of JAX, `platform`."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": cores,
        "devices": [device.device_kind for device in jax.devices()],
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str | None:
    if not CPU_FILE.exists():
        return platform.processor() or None
    for line in CPU_FILE.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return None


def described(found: dict[str, Any]) -> str:
    """One line."""
    cores, cpu = found.get("cores"), found.get("cpu") or found.get("platform")
    devices = found.get("devices") or []
    others = sorted({d for d in devices if d != "cpu"})
    count = f"{len(devices)} x " if len(devices) > 1 and len(others) == 1 else ""
    return f"{cores} cores of {cpu}, " + (f"{count}{', '.join(others)}" if others else "CPU only")
