"""The hardware of this machine: device, memory, cores and disk."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """Hardware that a training would use; memory and disk are what is free, in GB."""

    device: str  # its type, such as cpu or cuda
    name: str
    memory: float  # of the device
    cores: int  # that this process may use
    disk: float


def read_machine(device: torch.device, folder: Path) -> Machine:
    """Return the hardware, with the disk of ``folder``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, free = "CPU", _free_memory()
    if device.type == "cuda":
        name, free = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    disk = shutil.disk_usage(folder).free
    return Machine(device.type, name, free / 1e9, cores or 1, disk / 1e9)


def _free_memory() -> int:
    """Return the free memory of the computer in bytes; all of it where it is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**20
        return pages * 4096
