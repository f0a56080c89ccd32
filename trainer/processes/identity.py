"""Which process a number means.

A process number alone names nobody: containers and other machines use the same few numbers, and the kernel gives a
number again once its process has ended. torch is not imported here.
"""

import os
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_PROC = Path("/proc")
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has one signal for both


@dataclass(frozen=True)
class Identity:
    """One process among all processes of all machines. Linux tells all of it; other systems only the number.

    Attributes:
        boot: random id of the boot of its kernel; empty if unknown.
        namespace: id of its process namespace (each container has its own); empty if unknown.
        pid: its number there.
        began: when it began, in clock ticks since the boot; empty if unknown.
    """

    boot: str
    namespace: str
    pid: int
    began: str

    @classmethod
    def of(cls, pid: int | None = None) -> "Identity":
        """Identifies a process of this machine and namespace.

        Args:
            pid: its number; None for this process.
        """
        boot = namespace = ""
        with suppress(OSError):
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink(_PROC / "self/ns/pid")
        return cls(boot, namespace, os.getpid() if pid is None else pid, _stat(pid)[1])

    def to_dict(self) -> dict[str, str | int]:
        """Returns plain values, for JSON."""
        return asdict(self)

    def is_running(self) -> bool:
        """Whether it is confirmed that this very process runs here; False also if that cannot be told."""
        here = Identity.of(self.pid)
        return "" not in (self.boot, self.namespace, self.began) and here == self and _stat(self.pid)[0] not in "ZX"

    def kill(self, number: signal.Signals = _KILL) -> bool:
        """Sends a signal to this very process, and to no other.

        Returns:
            Whether it was sent.
        """
        with suppress(ProcessLookupError):
            try:
                handle = os.pidfd_open(self.pid)  # from here on its number cannot pass to another process unnoticed
            except (AttributeError, PermissionError, OSError) as error:
                if isinstance(error, ProcessLookupError) or not self.is_running():
                    return False
                os.kill(self.pid, number)  # an old kernel, or a sandbox without such handles
                return True
            try:
                if self.is_running():
                    signal.pidfd_send_signal(handle, number)
                    return True
            finally:
                os.close(handle)
        return False


def _stat(pid: int | None) -> tuple[str, str]:
    """Returns the state of a process, as one letter, and when it began; empty where the system does not say."""
    try:
        # The name, in parentheses, may hold spaces and parentheses itself.
        fields = (_PROC / ("self" if pid is None else str(pid)) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""
