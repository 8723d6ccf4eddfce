"""The online loop on two machines: network and mount namespaces with folders of their own, and one shared folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch import ROOT, free_port


pytestmark = pytest.mark.slow

_LIMIT_SECONDS = 400


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two network namespaces that see each other as 10.77.0.1 and 10.77.0.2, and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, `ip` and `unshare`")
    names = [f"tm{os.getpid()}h{i}" for i in range(2)]
    links = [f"tm{os.getpid()}v{i}"[-15:] for i in range(2)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
            for number, (name, link) in enumerate(zip(names, links, strict=True)):
                ip("link", "set", link, "netns", name)
                ip("-n", name, "link", "set", link, "name", "net0")
                ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "net0")
                ip("-n", name, "link", "set", "net0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"namespaces are not granted here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def start(host: str, number: int, port: int, own: Path, mount: Path, folders: list[Path]) -> subprocess.Popen:
    """One machine of two: its own folder stands under the same name as the other's own."""
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --node-rank {number} --nproc-per-node 1"
    torchrun += f" --master-addr 10.77.0.1 --master-port {port} -m tests.online_worker {shlex.join(map(str, folders))}"
    script = f"mount --bind {own} {mount} && hostname machine{number} && exec {torchrun}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    environment |= {"GLOO_SOCKET_IFNAME": "net0", "TQDM_DISABLE": "1"}
    command = ["ip", "netns", "exec", host, "unshare", "--mount", "--uts", "sh", "-c", script]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@dataclass
class Ended:
    """Two runs on both machines, one after the other: in a folder that they share, and in one of each machine's."""

    shared: Path
    disks: list[Path]
    statuses: list[int]
    errors: list[str]


@pytest.fixture(scope="module")
def ended(hosts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    base = tmp_path_factory.mktemp("machines")
    shared, mount, *disks = (base / name for name in ("shared", "own", "disk0", "disk1"))
    for folder in (shared, mount, *disks):
        folder.mkdir()
    port = free_port()
    machines = [
        start(host, number, port, own, mount, [shared, mount])
        for number, (host, own) in enumerate(zip(hosts, disks, strict=True))
    ]
    try:
        errors = [machine.communicate(timeout=_LIMIT_SECONDS)[1] for machine in machines]
        return Ended(shared, disks, [machine.returncode for machine in machines], errors)
    finally:
        for machine in machines:
            machine.kill()


def test_two_machines_share_the_rollouts_through_one_folder(ended):
    paths = [ended.shared / f"rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), "\n".join(errors[-4000:] for errors in ended.errors)
    first, second = (json.loads(path.read_text()) for path in paths)
    for key in ("revision", "rows", "trajectories", "steps", "pass@1"):
        assert first[key] == second[key]
    assert first["rows"] == [5, 5] and first["trajectories"] == [20, 20] and first["steps"] == 6
    assert first["rolled_out"] and not set(first["rolled_out"]) & set(second["rolled_out"])


def test_two_machines_without_a_shared_folder_are_told_before_the_first_rollout(ended):
    for status, errors in zip(ended.statuses, ended.errors, strict=True):
        assert status != 0
        assert "Process 0 on machine0 wrote a file to" in errors and "process 1 on machine1" in errors
        assert "so the folder is not shared" in errors
    assert list(ended.shared.rglob("shard-*")) and not [path for disk in ended.disks for path in disk.rglob("shard-*")]
