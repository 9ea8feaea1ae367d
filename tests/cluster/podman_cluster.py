"""docker-compose.yml run for real where there is no Docker and no image registry: podman as root, from Debian.

Everything that podman keeps (images, containers, volumes, networks) lies in one folder of its own, which goes when the
test ends. Images that cannot be pulled are stood in for by ones of the same name, made from a Debian that `debootstrap`
unpacks: it has Python 3.11, Redis 7.0 and Prometheus 2.42, where the real ones have later versions. What only a
registry has is left out: Grafana and the Redis exporter.

podman 4.3 differs from Docker in three ways that matter here, and the test does by hand what it leaves undone: it waits
for no health of `depends_on` (so `init` is run first), runs no health check by itself without systemd (so `healthy`
does), and podman-compose takes `--scale` for one service only (so an override file says how many).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
# Of this run alone: podman keeps what it knows of a network's names outside our folder, by the network's name.
PROJECT = f"katana{os.getpid()}"
PACKAGES = "python3,python3-venv,redis-server,prometheus,wget,ca-certificates"
LEFT_OUT = ("grafana", "redis-exporter")  # Debian has neither
UNUSED = ["./var/cache/*", "./var/lib/apt/*", "./proc/*", "./sys/*", "./dev/*"]
UNUSED += [f"./usr/share/{name}/*" for name in ("doc", "locale", "man", "javascript", "nodejs")]
# Entry points of the real images, where a service gives options only.
ENTRIES = {"prom/prometheus": '["/bin/prometheus"]'}

# Locks are files: the default, one piece of shared memory a host, would be shared with a podman that is not ours.
_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
_STORAGE_CONF = """\
[storage]
driver = "{driver}"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""


def say(text: str) -> None:
    """A line of the test's log, with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def wait_for(what: str, there: Callable[[], Any], *, within_s: float) -> Any:
    """The first true answer of `there`. Raises AssertionError when none came in time."""
    deadline = time.monotonic() + within_s
    while not (found := there()):
        assert time.monotonic() < deadline, f"{what}: not within {within_s:g} s"
        time.sleep(1)
    return found


def cache() -> Path:
    """What may be kept between two runs of the test: the unpacked Debian and the wheels."""
    folder = Path(os.environ.get("KATANA_CLUSTER_CACHE", ROOT / ".cache" / "cluster"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Container:
    """What podman says of a container; `pid` is 0 when it does not run."""

    name: str
    service: str
    status: str
    exit_code: int
    pid: int
    facts: dict[str, Any]

    @property
    def running(self) -> bool:
        return self.status == "running"

    def proc(self, name: str) -> str:
        """A file of its process 1 under /proc, seen from the host."""
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def sees(self, path: str) -> list[str]:
        """Names in a folder of the container."""
        return sorted(entry.name for entry in Path(f"/proc/{self.pid}/root{path}").iterdir())


@dataclass
class PodmanCluster:
    """The cluster, and the podman that carries it; `settings` are variables of .env."""

    folder: Path
    settings: dict[str, str]
    scale: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "containers.conf").write_text(_CONTAINERS_CONF.format(folder=self.folder))
        driver = _storage_driver(self.folder)
        (self.folder / "storage.conf").write_text(_STORAGE_CONF.format(folder=self.folder, driver=driver))
        self.services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

    # --- commands ----------------------------------------------------------------------------------------------

    def run(self, *command: str, within_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command with podman's settings; AssertionError with the end of what it said when it fails."""
        paths = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}
        env = os.environ | self.settings | {name: str(self.folder / file) for name, file in paths.items()}
        # Into a file: a container's monitor keeps what it is given open for as long as it lives.
        with (self.folder / "said").open("w+") as said, (self.folder / "answer").open("w+") as answer:
            result = subprocess.run(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=answer, stderr=said, timeout=within_s
            )
            answer.seek(0), said.seek(0)
            done = subprocess.CompletedProcess(command, result.returncode, answer.read(), said.read())
        text = (done.stdout + done.stderr)[-3000:]
        assert done.returncode == 0 or not check, f"{' '.join(command)}: exit code {done.returncode}\n{text}"
        return done

    def compose(self, *arguments: str, within_s: float = 600.0, check: bool = True) -> str:
        """docker-compose.yml as it stands, and the override that says how many; what it answered."""
        override = self.folder / "override.yml"
        counts = {name: {"scale": count} for name, count in self.scale.items()}
        override.write_text(yaml.safe_dump({"services": counts}))
        files = ["-f", str(ROOT / "docker-compose.yml"), "-f", str(override)]
        command = [sys.executable, "-m", "podman_compose", "-p", PROJECT, *files, *arguments]
        done = self.run(*command, within_s=within_s, check=check)
        return done.stdout + done.stderr

    # --- images ------------------------------------------------------------------------------------------------

    def stand_in(self) -> None:
        """Images of the names that docker-compose.yml and the Dockerfile ask for."""
        packed = cache() / "debian.tar"
        if not packed.exists():
            say(f"unpacking a Debian with {PACKAGES}")
            self._pack_debian(packed)
        for image in self.images():
            entry = ENTRIES.get(image.partition(":")[0])
            change = ["--change", f"ENTRYPOINT {entry}"] if entry else []
            full = f"docker.io/{image}" if "/" in image else f"docker.io/library/{image}"
            self.run("podman", "import", "--quiet", *change, str(packed), full, within_s=300)
        say(f"stood in for: {', '.join(self.images())}")

    def images(self) -> list[str]:
        """Names of what is pulled elsewhere."""
        names = {service["image"] for name, service in self.services.items() if name not in LEFT_OUT}
        base = re.search(r"^ARG PYTHON_IMAGE=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        assert base is not None
        return sorted({name for name in names if not name.startswith("katana:")} | {base[1]})

    def build(self) -> None:
        """The project's image, from its Dockerfile; packages come from a folder that the host's pip fills."""
        wheels = cache() / "wheels"
        self.run(*_pip_download(wheels), within_s=1200)
        options = ["--isolation", "chroot", "--layers=false", "--pull-never", "--target", "cpu"]
        options += ["--volume", f"{wheels}:/wheels:ro", "--build-arg", "PIP_FIND_LINKS=/wheels"]
        options += ["--build-arg", "PIP_NO_INDEX=1"]
        self.run("buildah", "bud", *options, "-t", "katana:cpu", ".", within_s=1800)
        say(f"built katana:cpu from the Dockerfile and {len(list(wheels.glob('*.whl')))} wheels")

    def _pack_debian(self, target: Path) -> None:
        """A Debian root as one archive, with the data folders that the real images have, owned as there."""
        root = Path(tempfile.mkdtemp(prefix="debian-", dir=self.folder))
        root.chmod(0o755)
        self.run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), within_s=1800)
        for name, owner in (("data", 999), ("prometheus", 65534)):
            (root / name).mkdir()
            os.chown(root / name, owner, owner)
        draft = target.with_suffix(".new")
        left_out = [f"--exclude={name}" for name in UNUSED]
        self.run("tar", "-C", str(root), *left_out, "-cf", str(draft), ".", within_s=600)
        draft.rename(target)
        shutil.rmtree(root)

    # --- the cluster -------------------------------------------------------------------------------------------

    def up(self, *services: str) -> None:
        self.compose("up", "-d", "--no-deps", "--no-build", "--no-recreate", *services)

    def containers(self, service: str | None = None) -> list[Container]:
        """In the order of their names."""
        names = self.run("podman", "ps", "--all", "--format", "{{.Names}}").stdout.split()
        facts = json.loads(self.run("podman", "container", "inspect", *names).stdout) if names else []
        found = [_container(item) for item in facts]
        return sorted((item for item in found if service in (None, item.service)), key=lambda item: item.name)

    def healthy(self, container: Container) -> bool:
        """Run the container's own health check, once."""
        return self.run("podman", "healthcheck", "run", container.name, check=False).returncode == 0

    def kill(self, container: Container) -> None:
        """As a crash does it: from outside, without podman's knowledge, so that the restart policy acts."""
        assert container.pid > 1
        os.kill(container.pid, signal.SIGKILL)

    def volume(self, name: str) -> Path:
        return self.folder / "storage" / "volumes" / f"{PROJECT}_{name}" / "_data"

    def prometheus(self, path: str) -> Any:
        """An answer of Prometheus's API, through the port that is published on 127.0.0.1; None before it answers."""
        url = f"http://127.0.0.1:{self.settings['PROMETHEUS_PORT']}/api/v1/{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def targets(self) -> dict[str, list[str]]:
        """Job → health of its targets (`up`, `down`, `unknown`), without what is left out of this cluster."""
        found: dict[str, list[str]] = {}
        for target in (self.prometheus("targets?state=active") or {}).get("activeTargets", []):
            found.setdefault(target["labels"]["job"], []).append(target["health"])
        found.pop("redis", None)
        return found

    def logs(self) -> Iterator[str]:
        """The last lines of every container, for a test that failed."""
        for container in self.containers():
            done = self.run("podman", "logs", "--tail", "12", container.name, check=False)
            yield f"--- {container.name}: {container.status} {container.exit_code}\n{done.stdout}{done.stderr}"

    def remove(self) -> None:
        """Take all of it away: containers, networks, volumes, images, the folder."""
        for name in self.run("podman", "ps", "--all", "--quiet", check=False).stdout.split():
            self.run("podman", "rm", "--force", "--time", "2", name, check=False)
        self.run("podman", "system", "reset", "--force", within_s=300, check=False)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((mount for mount in mounts if mount.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", mount], check=False, capture_output=True)
        shutil.rmtree(self.folder)


@contextmanager
def podman_cluster(**settings: str) -> Iterator[PodmanCluster]:
    """A cluster of the test's own; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="katana-cluster-"))
    cluster = PodmanCluster(folder, {"PROMETHEUS_PORT": str(_free_port()), **settings})
    try:
        yield cluster
    except BaseException:
        say("failed\n" + "".join(cluster.logs()))
        raise
    finally:
        cluster.remove()


def _container(facts: dict[str, Any]) -> Container:
    state, service = facts["State"], facts["Config"]["Labels"]["com.docker.compose.service"]
    return Container(facts["Name"], service, state["Status"], state["ExitCode"], state["Pid"], facts)


def _pip_download(wheels: Path) -> list[str]:
    """The wheels of pyproject.toml's dependencies, from wherever this host's pip looks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # Debian's Python 3.11.2 needs one package that later ones do not.
    packages = [*project["project"]["dependencies"], *project["build-system"]["requires"], "async-timeout"]
    where = ["--dest", str(wheels), "--constraint", str(ROOT / "constraints.txt")]
    exactly = ["--only-binary=:all:", "--python-version=3.11"]
    return [sys.executable, "-m", "pip", "download", "--quiet", *where, *exactly, *packages]


def _storage_driver(folder: Path) -> str:
    """overlay where this host can mount one; vfs, which copies whole images, anywhere."""
    trial = Path(tempfile.mkdtemp(dir=folder))
    for name in ("lower", "upper", "work", "merged"):
        (trial / name).mkdir()
    options = f"lowerdir={trial}/lower,upperdir={trial}/upper,workdir={trial}/work"
    merged = str(trial / "merged")
    mounted = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], capture_output=True)
    if mounted.returncode == 0:
        subprocess.run(["umount", merged], check=True)
    shutil.rmtree(trial)
    return "overlay" if mounted.returncode == 0 else "vfs"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
