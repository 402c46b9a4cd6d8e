"""How busy the machine was: time stolen by the hypervisor, and the memory of a tree of processes."""

import psutil


class StealMeter:
    """Share of processor time stolen since the meter was made (0 where the system does not tell)."""

    def __init__(self) -> None:
        self._start = psutil.cpu_times()

    def share(self) -> float:
        """Stolen time over all time, 0 to 1."""
        now = psutil.cpu_times()
        total = sum(now) - sum(self._start)
        stolen = getattr(now, "steal", 0.0) - getattr(self._start, "steal", 0.0)
        return stolen / total if total > 0 else 0.0


def proportional_set_bytes(pid: int) -> int:
    """Sum of the proportional set sizes of a process and its descendants; those that end meanwhile count nothing."""
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total
