"""What to do where this machine lacks a layer of isolation."""

from __future__ import annotations


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


def advice(layer: str) -> str:
    """What to do where a layer is missing."""
    return _ADVICE[layer]
