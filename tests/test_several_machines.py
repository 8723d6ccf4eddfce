"""The online loop on two machines: network and mount namespaces with folders of their own, and one shared folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT, free_port


pytestmark = pytest.mark.slow

_LIMIT_SECONDS = 400


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
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


def start(host: str, number: int, port: int, own: Path, mount: Path, folder: Path) -> subprocess.Popen:
    """One machine of two: its own folder stands under the same name as the other's own."""
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --node-rank {number} --nproc-per-node 1"
    torchrun += f" --master-addr 10.77.0.1 --master-port {port} -m tests.online_worker {folder}"
    script = f"mount --bind {own} {mount} && hostname machine{number} && exec {torchrun}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    environment |= {"GLOO_SOCKET_IFNAME": "net0", "TQDM_DISABLE": "1"}
    command = ["ip", "netns", "exec", host, "unshare", "--mount", "--uts", "sh", "-c", script]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def run_on_both(hosts: list[str], tmp_path: Path, folder: Path) -> list[tuple[int, str]]:
    """Exit status and errors of both machines."""
    port, mount = free_port(), tmp_path / "own"
    mount.mkdir()
    machines = []
    for number, host in enumerate(hosts):
        own = tmp_path / f"disk{number}"
        own.mkdir()
        machines.append(start(host, number, port, own, mount, folder))
    try:
        return [
            (machine.returncode, errors)
            for machine in machines
            for errors in [machine.communicate(timeout=_LIMIT_SECONDS)[1]]
        ]
    finally:
        for machine in machines:
            machine.kill()


def test_two_machines_share_the_rollouts_through_one_folder(hosts, tmp_path):
    (tmp_path / "shared").mkdir()
    for status, errors in run_on_both(hosts, tmp_path, tmp_path / "shared"):
        assert status == 0, errors[-4000:]
    first, second = (json.loads((tmp_path / "shared" / f"rank{rank}.json").read_text()) for rank in range(2))
    for key in ("revision", "rows", "trajectories", "steps", "pass@1"):
        assert first[key] == second[key]
    assert first["rows"] == [5, 5] and first["trajectories"] == [20, 20] and first["steps"] == 6
    assert first["rolled_out"] and not set(first["rolled_out"]) & set(second["rolled_out"])


def test_two_machines_without_a_shared_folder_are_told_before_the_first_rollout(hosts, tmp_path):
    for status, errors in run_on_both(hosts, tmp_path, tmp_path / "own"):
        assert status != 0
        assert "Process 0 on machine0 wrote a file to" in errors and "process 1 on machine1" in errors
        assert "so the folder is not shared" in errors
    assert not list(tmp_path.rglob("shard-*"))
