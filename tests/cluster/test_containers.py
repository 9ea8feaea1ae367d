"""The cluster of docker-compose.yml, for real: built, started, scaled, hurt, watched until its ledger is closed."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
from podman_cluster import LEFT_OUT, Container, PodmanCluster, podman_cluster, say, wait_for
from system import REQUIRE, need

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]

STEPS = 300  # minutes: enough for all that is done to the cluster meanwhile
ROLES = ("feeder", "rollout", "teacher", "arbiter", "learner", "evaluator")
SERVICES = ("redis-data", "redis-broker", *ROLES, "prometheus")
ENDING = ("feeder", "arbiter", "learner", "evaluator")  # these end with the run, workers wait for the next
GRACE_S = 45.0  # stop_grace_period


def _need_podman() -> None:
    for program in ("podman", "buildah", "runc", "debootstrap", "iptables", "mount"):
        need(program)
    if importlib.util.find_spec("podman_compose") is None:
        if os.environ.get(REQUIRE):
            pytest.fail(f"podman-compose is not installed, and {REQUIRE} is set")
        pytest.skip("podman-compose is not installed: pip install -e '.[cluster]'")
    if os.geteuid() != 0:
        pytest.skip("not root: the cluster's networks and limits are set up by root")


def test_a_cluster_is_built_scaled_hurt_and_ends_with_a_closed_ledger() -> None:
    _need_podman()
    with podman_cluster(KATANA_SET=f"learner.max_steps={STEPS}") as cluster:
        say(f"left out, for they are only to be had from a registry: {', '.join(LEFT_OUT)}")
        cluster.stand_in()
        cluster.build()
        _start(cluster)
        _scale(cluster)
        _hurt(cluster)
        _check_health(cluster)
        _check_hardening(cluster)
        _check_end(cluster)
        _check_operator(cluster)
        _check_stop(cluster)
    assert not cluster.folder.exists()
    say("taken down: containers, networks, volumes, images")


def _start(cluster: PodmanCluster) -> None:
    cluster.scale = {"rollout": 2, "teacher": 2}
    cluster.up("init")
    wait_for("init", lambda: cluster.containers("init")[0].status == "exited", within_s=60)
    assert cluster.containers("init")[0].exit_code == 0
    began = time.monotonic()
    cluster.up(*SERVICES)
    wait_for("the first step", lambda: _steps(cluster) >= 1, within_s=300)
    say(f"up: {len(_running(cluster))} containers, first step after {time.monotonic() - began:.0f} s")


def _check_hardening(cluster: PodmanCluster) -> None:
    """What docker-compose.yml promises, as the kernel sees it."""
    running = _running(cluster)
    for container in running:
        status = dict(line.split(":\t", 1) for line in container.proc("status").splitlines() if ":\t" in line)
        assert "0" not in status["Uid"].split() and "0" not in status["Gid"].split(), container.name
        assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1"), container.name
        root = next(line for line in container.proc("mountinfo").splitlines() if line.split()[4] == "/")
        assert "ro" in root.split()[5].split(","), container.name
        assert container.facts["HostConfig"]["Memory"] > 0 and container.facts["HostConfig"]["PidsLimit"] > 0
        # A default route leads out; only what publishes a port has one.
        routes = [line.split()[1] for line in container.proc("net/route").splitlines()[1:]]
        assert ("00000000" in routes) == (container.service == "prometheus"), container.name
        if container.service in ROLES:
            seen = {role for role in ROLES if container.sees(f"/secrets/{role}")}
            assert seen == {container.service}, f"{container.name} sees the passwords of {seen}"
    say("no root, no capability, read-only, limited, no way out, no password but its own: all containers")


def _check_health(cluster: PodmanCluster) -> None:
    """Every Prometheus target up, as many as there are containers; every health check healthy."""
    expected = {role: ["up"] * cluster.scale.get(role, 1) for role in (*ROLES, "prometheus")}
    wait_for(f"targets {expected}", lambda: cluster.targets() == expected, within_s=180)
    say(f"Prometheus targets up: {', '.join(f'{job} {len(health)}' for job, health in sorted(expected.items()))}")
    running = _running(cluster)
    assert len(running) == len(SERVICES) + 4
    for container in running:
        wait_for(f"health of {container.name}", lambda one=container: cluster.healthy(one), within_s=180)
    say(f"healthy: {len(running)} containers, at step {_steps(cluster)}")


def _scale(cluster: PodmanCluster) -> None:
    cluster.scale = {"rollout": 3, "teacher": 3}
    cluster.up("rollout", "teacher")
    assert [len(cluster.containers(role)) for role in ("rollout", "teacher")] == [3, 3]
    say(f"scaled to rollout=3, teacher=3 at step {_steps(cluster)}")


def _hurt(cluster: PodmanCluster) -> None:
    step = _steps(cluster)
    assert step < STEPS, "the run was over before anything could be killed"
    victims = [cluster.containers(role)[0] for role in ("rollout", "teacher")]
    for victim in victims:
        cluster.kill(victim)
    say(f"killed {', '.join(victim.name for victim in victims)} at step {step}")
    for victim in victims:
        wait_for(f"{victim.name} again", lambda one=victim: _again(cluster, one), within_s=120)
    say("both were started again by their restart policy")


def _again(cluster: PodmanCluster, before: Container) -> bool:
    now = next(one for one in cluster.containers(before.service) if one.name == before.name)
    return now.running and now.pid != before.pid


def _check_end(cluster: PodmanCluster) -> None:
    def over() -> bool:
        return all(not one.running for role in ENDING for one in cluster.containers(role))

    wait_for("the end of the run", over, within_s=1200)
    ended = {one.name: one.exit_code for role in ENDING for one in cluster.containers(role)}
    assert set(ended.values()) == {0}, ended
    summary = json.loads((_run_folder(cluster) / "summary.json").read_text())
    ledger = summary["ledger"]
    dropped = sum(ledger["dropped"].values())
    assert ledger["open"] == 0 and ledger["dead"] == 0
    assert ledger["admitted"] == ledger["trained"] + dropped > 0
    assert _steps(cluster) == STEPS and (_run_folder(cluster) / "report.png").exists()
    say(f"the run is over: {STEPS} steps, ledger {json.dumps(ledger)}")


def _check_operator(cluster: PodmanCluster) -> None:
    """Commands by hand; and a feeder that is started once more finds the run over."""
    cluster.compose("--profile", "tools", "run", "--rm", "--no-deps", "operator", "dead", "/runs/demo/config.yaml")
    cluster.up("feeder")
    wait_for("the feeder", lambda: not cluster.containers("feeder")[0].running, within_s=120)
    assert cluster.containers("feeder")[0].exit_code == 0
    say("the operator's commands reach Redis; a feeder started again ends at once, with 0")


def _check_stop(cluster: PodmanCluster) -> None:
    began = time.monotonic()
    cluster.compose("stop", *SERVICES, check=False)
    took = time.monotonic() - began
    killed = [one.name for one in cluster.containers() if one.running or one.exit_code == 137]
    assert not killed, f"not stopped within their grace: {killed}"
    say(f"stopped in {took:.0f} s, nobody had to be killed")


def _running(cluster: PodmanCluster) -> list[Container]:
    return [one for one in cluster.containers() if one.running]


def _run_folder(cluster: PodmanCluster) -> Path:
    return cluster.volume("runs") / "demo"


def _steps(cluster: PodmanCluster) -> int:
    path = _run_folder(cluster) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
