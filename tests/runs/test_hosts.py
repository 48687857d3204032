"""Which machine starts which ranks, and the command that starts another machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

from dlmconvert.errors import UserError
from dlmconvert.runs.hosts import Host, Share, deal, host_and_port, read_hostfile, share_of_node, shares_of_hosts, ssh_command
from dlmconvert.training.launchers import Place

SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[4-5]", "SLURM_PROCID": "1"}


def test_a_hostfile(tmp_path):
    (tmp_path / "hosts").write_text("# the left rack\ngpu1 slots=8\nme@gpu2.cluster slots = 4  # older\n\n10.0.0.3\n")
    hosts = read_hostfile(str(tmp_path / "hosts"))
    assert hosts == [Host("gpu1", 8), Host("me@gpu2.cluster", 4), Host("10.0.0.3", None)] and hosts[1].address == "gpu2.cluster"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu1 slots=8\n-oProxyCommand=evil slots=8\n", "line 2: .* is not a host"),
        ("gpu1; rm -rf / slots=8\n", "line 1"),
        ("gpu1 slots=none\n", "line 1"),
        ("gpu1 slots=2\ngpu1 slots=2\n", "line 2: gpu1 is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_what_is_no_hostfile(text, message, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(str(tmp_path / "hosts"))
    with pytest.raises(UserError, match="cannot read the hostfile"):
        read_hostfile(str(tmp_path / "absent"))


A, B, C = Host("a", 8), Host("b", 4), Host("c")


@pytest.mark.parametrize(
    ("hosts", "processes", "nodes", "dealt"),
    [
        ([A, B], None, None, [(A, 8), (B, 4)]),
        ([A, B], 10, None, [(A, 8), (B, 2)]),
        ([A, B], 6, None, [(A, 6)]),
        ([A, B], 6, 2, [(A, 3), (B, 3)]),
        ([A, B, C], 4, 1, [(A, 4)]),
        ([A, C], 6, None, [(A, 3), (C, 3)]),
    ],
)
def test_dealing_processes_to_hosts(hosts, processes, nodes, dealt):
    assert deal(hosts, processes, nodes) == dealt


@pytest.mark.parametrize(
    ("hosts", "processes", "nodes", "message"),
    [
        ([A, B], 13, None, "the hostfile has 12 slots"),
        ([A, B], 10, 2, "5 processes on b, which has slots=4"),
        ([A, B], 7, 2, "--processes 7 cannot be dealt to 2 machines"),
        ([A, B], 7, 3, "--nodes 3, but the hostfile names 2"),
        ([A, C], None, None, "The hostfile gives c no slots"),
    ],
)
def test_no_room(hosts, processes, nodes, message):
    with pytest.raises(UserError) as caught:
        deal(hosts, processes, nodes)
    assert message in str(caught.value)


def test_shares_follow_each_other_and_the_first_host_is_this_one():
    first, second = shares_of_hosts([(Host("localhost"), 3), (Host("127.0.0.2"), 2)], "hosts")
    assert (first.first, first.count, second.first, second.count) == (0, 3, 3, 2) and first.total == second.total == 5
    assert (first.address, first.port) == (second.address, second.port) == ("127.0.0.1", first.port)
    with pytest.raises(UserError, match="the first host of hosts is 192.0.2.1, this machine is"):
        shares_of_hosts([(Host("192.0.2.1"), 1), (Host("localhost"), 1)], "hosts")


def test_the_share_of_a_numbered_node():
    assert share_of_node({}, None, 16, 2, 1, "gpu1:700") == Share(8, 8, 16, "gpu1", 700)
    assert share_of_node({}, None, 8, 1, None, None) is None
    assert share_of_node(SLURM, Place(1, 2, 0), 16, 2, None, None) == Share(8, 8, 16, "n4", 29500)  # srun with one task a node
    assert share_of_node(SLURM, Place(1, 2, 0), 2, 2, None, None) is None  # srun with one task a GPU
    assert share_of_node({}, Place(3, 16, 3), 16, 2, None, None) is None  # torchrun
    with pytest.raises(UserError, match="--node-rank, but a launcher has started 16 processes already"):
        share_of_node({}, Place(3, 16, 3), 16, 2, 1, "gpu1:700")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0, "a:1"), "--nodes 2 without --processes"),
        ((16, 2, None, "a:1"), "--nodes 2 without --node-rank"),
        ((16, 2, None, None), "without --node-rank and --master"),
        ((16, 2, 2, "a:1"), "they are numbered 0 to 1"),
        ((15, 2, 1, "a:1"), "cannot be dealt to 2 machines"),
        ((16, 2, 1, "a b"), "is not HOST:PORT"),
        ((16, 2, 1, "a:99999"), "is not HOST:PORT"),
    ],
)
def test_what_a_node_must_be_told(arguments, message):
    with pytest.raises(UserError) as caught:
        share_of_node({}, None, *arguments)
    assert message in str(caught.value)


def test_hosts_and_ports():
    assert [host_and_port(text) for text in ("a", "a.b:7", "[fe80::1]:7", "10.0.0.1")] == [("a", 29500), ("a.b", 7), ("fe80::1", 7), ("10.0.0.1", 29500)]


def test_the_ssh_command_is_quoted_and_carries_no_secret(tmp_path, monkeypatch):
    """Run by a shell as sshd would: the words arrive as they are, in the same folder."""
    folder = tmp_path / "a folder; with $(things)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "dlmconvert.py").write_text("import sys, os, json\nprint(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))\n")
    environment = {"PYTHONPATH": ".", "NCCL_DEBUG": "a b", "HF_TOKEN": "hf_1", "OMP_API_KEY": "k", "HOME": "/nowhere", "NCCL_SECRET": "s"}
    words = ["adapt", "gpt2", "data.train=my file's.jsonl", "x=$HOME `id` \\"]
    command = ssh_command(Host("gpu2", 2), ["-p", "2222"], words, Share(2, 2, 4, "10.0.0.1", 700), environment)
    assert command[0] == "ssh" and command[-4:-1] == ["-p", "2222", "gpu2"] and "BatchMode=yes" in command
    assert not any(secret in shlex.join(command) for secret in ("hf_1", "OMP_API_KEY", "NCCL_SECRET", "/nowhere"))
    clean = {name: value for name, value in os.environ.items() if name in ("PATH",)}
    done = subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, env=clean, cwd="/", check=True)
    got, where, seen = json.loads(done.stdout)
    assert got == words and where == str(folder) and seen["NCCL_DEBUG"] == "a b" and seen["PYTHONPATH"] == str(folder)
    assert Share(**json.loads(seen["DLMCONVERT_NODE"])) == Share(2, 2, 4, "10.0.0.1", 700) and sys.executable in command[-1]
