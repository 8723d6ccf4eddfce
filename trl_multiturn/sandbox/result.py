"""What a tool call comes back with: the policy's mistakes are data, the machine's failures are exceptions."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import IsolationError as IsolationError, ToolFailure as ToolFailure


STATUSES = ("ok", "error", "timeout", "memory", "crashed")
_ADVICE = {
    "landlock": (
        "Landlock needs Linux 5.13 or later, with `landlock` in the kernel's `lsm=` list; in a container, a seccomp "
        "profile that lets its three calls pass (Docker's default does since 20.10.10)"
    ),
    "seccomp": (
        "seccomp filters need Linux 3.17 or later with CONFIG_SECCOMP_FILTER, on x86-64 or aarch64; other systems "
        "have no such thing, so run in a Linux container or virtual machine"
    ),
    "namespaces": (
        "an extra only: they need unprivileged user namespaces (`sysctl kernel.unprivileged_userns_clone=1`, or "
        "`kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu), or a container with CAP_SYS_ADMIN"
    ),
}


@dataclass(frozen=True)
class ToolResult:
    """The outcome of one tool call.

    Args:
        output (`str`):
            The observation: what the policy reads next.
        status (`str`):
            `"ok"`; `"error"` (the code raised, or broke a limit on files, cells or length); `"timeout"` (it ran out of
            wall-clock or CPU time); `"memory"` (it asked for more memory than allowed); `"crashed"` (its process died,
            or its protocol was broken). All of them are the policy's doing. The machine's own failures raise
            [`ToolFailure`].
        seconds (`float`):
            Wall-clock time of the call, counted from the moment it was admitted to a core.
        images (`tuple[str, ...]`):
            Images that the policy sees before the text, as data URLs.
    """

    output: str
    status: str = "ok"
    seconds: float = 0.0
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"`status={self.status!r}` is not a tool status. Use one of {', '.join(STATUSES)}.")

    @property
    def ok(self) -> bool:
        """Whether the call ended without an error."""
        return self.status == "ok"


def encodable(text: str) -> str:
    """The text with half surrogate pairs replaced, which could be neither tokenized nor stored."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def advice(layer: str) -> str:
    """What to do where this machine lacks a layer of isolation."""
    return _ADVICE[layer]
