"""How busy the machine was: time stolen by the hypervisor, told beside every timed figure."""

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
