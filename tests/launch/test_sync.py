"""launch/sync.sh against a real sshd on the loopback, with keys, configuration and known hosts of its own."""

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributed.launching import REPOSITORY, free_port

SYNC = REPOSITORY / "launch" / "sync.sh"
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
RUN = 'it\'s a "first" run; $(touch pwned) `touch pwned` $HOME * é'
HEAVY = ("checkpoint-12/optimizer.pt", "probes/entropy/notes", "adapter_model.safetensors")
METRICS = '{"step": 1, "reward": 0.5}\n{"step": 12, "reward": 0.75}\n'

# Cuts the connection after that many bytes from the server, and notes those that came.
CUTTING_PROXY = """
import socket, sys, threading
port, limit, count = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
server, received = socket.create_connection(("127.0.0.1", port)), 0
def upload():
    while data := sys.stdin.buffer.raw.read(65536):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)
threading.Thread(target=upload, daemon=True).start()
while received < limit and (data := server.recv(65536)):
    received += len(data)
    with open(count, "a") as file:  # at once: ssh ends this process when it likes
        print(len(data), file=file)
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


def missing_tool() -> str | None:
    for name, path in {"rsync": shutil.which("rsync"), "ssh": shutil.which("ssh"), "sshd": SSHD}.items():
        if path is None:
            return f"{name} is not installed"
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        return "sshd run as root needs /run/sshd"
    return None


pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=f"{missing_tool()}: sync.sh cannot be tested here")


@dataclass
class Remote:
    """The other machine: where its runs lie, and how sync.sh finds it."""

    root: Path
    ssh_config: Path
    scratch: Path

    def sync(self, *command: str, host: str = "known", options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        common = ["--ssh-config", str(self.ssh_config), "--remote-root", str(self.root), "--into", str(self.home)]
        return subprocess.run(
            ["bash", str(SYNC), *common, *options, host, *command],
            cwd=self.scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def home(self) -> Path:
        return self.scratch / "copied 'home' runs"

    def bytes_received(self) -> int:
        """Through the proxies `cut` and `counted`, in all."""
        return sum(map(int, (self.scratch / "received").read_text().split()))


def generate_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def write_sshd_config(folder: Path, port: int) -> Path:
    """Host key and client key too; `StrictModes no`, as the folders above a test's own are not its business."""
    host_key, client_key = generate_key(folder / "host_key"), generate_key(folder / "client_key")
    (folder / "authorized_keys").write_text(client_key + "\n")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    path = folder / "sshd_config"
    path.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    return path


def write_ssh_config(folder: Path, port: int) -> Path:
    (folder / "proxy.py").write_text(CUTTING_PROXY)
    proxy = shlex.join([sys.executable, str(folder / "proxy.py"), str(port)])
    received = shlex.quote(str(folder / "received"))
    path = folder / "ssh_config"
    path.write_text(
        f"Host unknown\n  UserKnownHostsFile {folder}/nothing\n"
        f"Host cut\n  ProxyCommand {proxy} 1500000 {received}\n"
        f"Host counted\n  ProxyCommand {proxy} inf {received}\n"
        f"Host *\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  BatchMode yes\n"
        f"  IdentityFile {folder}/client_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    return path


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory):
    """Path of an ssh configuration whose hosts are one sshd: known, unknown, cut, counted."""
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    command = [SSHD, "-D", "-e", "-f", str(write_sshd_config(folder, port))]
    with open(folder / "sshd.log", "w") as log:
        sshd = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(port, sshd, folder / "sshd.log")
        yield write_ssh_config(folder, port)
    finally:
        os.killpg(sshd.pid, signal.SIGKILL)
        sshd.wait()


def wait_for(port: int, sshd: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        assert sshd.poll() is None, log.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(log.read_text())


@pytest.fixture
def remote(ssh_config, tmp_path) -> Remote:
    root = tmp_path / "remote's $(touch pwned) runs"
    for run in (RUN, "study/seed0", "checkpoint-named"):
        for name in (
            "config.yaml",
            "evaluation/metrics.csv",
            "checkpoint-12/model.safetensors",
            "probes/entropy/s.pt",
        ):
            path = root / run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name} of {run}")
        (root / run / "metrics.jsonl").write_text(METRICS)
    config = tmp_path / "ssh 'config'"
    config.write_text(ssh_config.read_text().replace(str(ssh_config.parent / "received"), str(tmp_path / "received")))
    return Remote(root, config, tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_run_whatever_its_name(remote):
    result = remote.sync("pull", RUN)
    assert result.returncode == 0, result.stderr
    assert files(remote.home) == {f"{RUN}/{name}": data for name, data in files(remote.root / RUN).items()}
    assert not list(remote.scratch.rglob("pwned"))


def test_nested_runs_keep_their_folders(remote):
    assert remote.sync("pull", "study/seed0/", "checkpoint-named").returncode == 0
    assert {name.split("/")[0] for name in files(remote.home)} == {"study", "checkpoint-named"}
    assert (remote.home / "study/seed0/metrics.jsonl").read_text() == METRICS


def test_all_runs(remote):
    assert remote.sync("all").returncode == 0
    assert files(remote.home) == files(remote.root)


@pytest.mark.parametrize("command", [("all",), ("pull", RUN, "study/seed0", "checkpoint-named")])
def test_metrics_only(remote, command):
    assert remote.sync(*command, options=("--metrics-only",)).returncode == 0
    kept = ("config.yaml", "metrics.jsonl", "evaluation/metrics.csv")
    assert set(files(remote.home)) == {f"{run}/{f}" for run in (RUN, "study/seed0", "checkpoint-named") for f in kept}


def test_list(remote):
    result = remote.sync("list")
    assert result.returncode == 0, result.stderr
    rows = [line.split(maxsplit=3) for line in result.stdout.splitlines()]
    assert [(step, run) for _, _, step, run in rows] == [
        ("12", "checkpoint-named"),
        ("12", RUN),
        ("12", "study/seed0"),
    ]
    assert not list(remote.scratch.rglob("pwned"))
    shutil.rmtree(remote.root)
    assert remote.sync("list").returncode != 0


@pytest.mark.parametrize("command", [("list",), ("pull", RUN)])
def test_unknown_host_key_is_refused(remote, command):
    result = remote.sync(*command, host="unknown")
    assert result.returncode != 0
    assert "Host key verification failed" in result.stderr
    assert not files(remote.home)


def test_newer_file_here_stays_and_older_is_replaced(remote):
    mine, old = remote.home / RUN / "config.yaml", remote.home / RUN / "metrics.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("noted by hand")
    os.utime(remote.root / RUN / "config.yaml", (1_000_000_000, 1_000_000_000))
    old.write_text(METRICS[:20])
    os.utime(old, (1, 1))
    extra = remote.home / RUN / "notes.txt"
    extra.write_text("only here")
    assert remote.sync("pull", RUN).returncode == 0
    assert (mine.read_text(), old.read_text(), extra.read_text()) == ("noted by hand", METRICS, "only here")


def test_interrupted_copy_goes_on(remote):
    big = remote.root / RUN / "checkpoint-12" / "optimizer.pt"
    big.write_bytes(os.urandom(3_000_000))
    cut = remote.sync("pull", RUN, host="cut")
    assert cut.returncode != 0
    assert "the same command continues" in cut.stderr
    before = remote.bytes_received()
    copy = remote.home / big.relative_to(remote.root)
    assert not copy.exists()  # nothing under its own name is half a file
    result = remote.sync("pull", RUN, host="counted")
    assert result.returncode == 0, result.stderr
    assert copy.read_bytes() == big.read_bytes()
    assert remote.bytes_received() - before < 2_200_000  # of 3 MB: the rest
    assert not list(remote.home.rglob(".rsync-partial"))


def test_port_and_identity(remote):
    """Options of their own overrule the configuration; the key's name has a quote and a space."""
    lines = remote.ssh_config.read_text().splitlines()
    settings = dict(line.split(maxsplit=1) for line in lines[-8:] if line.strip())
    key = remote.scratch / "my 'own' key"
    shutil.copy(settings["IdentityFile"], key)
    wrong = {f"Port {settings['Port']}": "Port 1", f"IdentityFile {settings['IdentityFile']}": "IdentityFile nothing"}
    text = remote.ssh_config.read_text()
    for right, other in wrong.items():
        text = text.replace(right, other)
    remote.ssh_config.write_text(text)
    assert remote.sync("pull", RUN).returncode != 0
    options = ("--port", settings["Port"], "--identity", str(key))
    for command in (("pull", RUN), ("list",)):
        result = remote.sync(*command, options=options)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((), "Usage"),
        (("pull",), "needs the name of a run"),
        (("pull", "../other"), "not the name of a run"),
        (("pull", "/etc"), "not the name of a run"),
        (("pull", "a/../../b"), "not the name of a run"),
        (("all", "x"), "takes no name of a run"),
        (("push",), "unknown command push"),
    ],
)
def test_mistakes_are_named(remote, command, message):
    result = remote.sync(*command)
    assert result.returncode == 2
    assert message in result.stderr


def test_missing_run_is_an_error(remote):
    result = remote.sync("pull", "no such run")
    assert result.returncode != 0
    assert "no such run" in result.stderr
