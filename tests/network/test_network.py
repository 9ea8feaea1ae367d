"""The demo on five hosts, 40 ms from Redis and back, over connections that break: nothing is lost. Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import HOSTS, REDIS, ROLES, Cluster, Host, NoNamespaces, Outcome, Way, localhost, network
from system import need

pytestmark = [pytest.mark.network, pytest.mark.timeout(2000)]
STEPS = int(os.environ.get("KATANA_NETWORK_STEPS", "40"))
WAY = Way(delay_s=0.020, break_every_s=8.0, seed=1)
SETTINGS = (f"learner.max_steps={STEPS}", "eval.every_steps=0", "rollout.workers=2", "feeder.record_audit=true")


@pytest.fixture
def hosts() -> Iterator[dict[str, Host]]:
    for program in ("ip", "unshare"):
        need(program)
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    try:
        with network() as made:
            yield made
    except NoNamespaces as error:
        pytest.skip(f"no network namespaces here: {error}")


def run(hosts: dict[str, Host], folder: Path, way: Way | None) -> Outcome:
    with Cluster(hosts, folder, way, SETTINGS) as cluster:
        return cluster.run(timeout_s=900)


def check_whole(outcome: Outcome) -> None:
    """The run reached its last step, everything admitted ended once, and every process ended as it should."""
    ledger = outcome.ledger
    assert ledger["admitted"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["dead"]
    assert (ledger["open"], ledger["dead"]) == (0, 0)
    assert outcome.steps[-1]["step"] == STEPS
    assert outcome.violations == []
    assert set(outcome.codes) == {f"{role}@{host}" for role, host in ROLES}
    for name, codes in outcome.codes.items():
        assert codes[-1] in (0, 130), f"{name} ended with {codes}"
        assert 2 not in codes, f"{name} was refused: {codes}"


def test_hosts_reach_each_other_only_over_the_network(hosts: dict[str, Host]) -> None:
    assert tuple(hosts) == HOSTS
    for host in hosts.values():
        named = subprocess.run(host.command(["uname", "-n"]), capture_output=True, text=True, timeout=20, check=True)
        assert named.stdout.strip() == host.name
        routes = subprocess.run(
            host.command(["ip", "-4", "-o", "addr"]), capture_output=True, text=True, timeout=20, check=True
        ).stdout
        assert sorted(line.split()[3] for line in routes.splitlines()) == [f"{host.address}/24", "127.0.0.1/8"]


def test_the_hosts_are_gone_afterwards() -> None:
    need("ip")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")

    def namespaces() -> set[str]:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20, check=True).stdout
        return {line.split()[0] for line in listed.splitlines()}

    before = namespaces()
    sleeping: subprocess.Popen[bytes] | None = None
    try:
        with pytest.raises(KeyboardInterrupt), network() as hosts:
            assert len(namespaces() - before) == len(HOSTS) + 1
            sleeping = subprocess.Popen(hosts[REDIS].command(["sleep", "600"]))
            while Path(f"/proc/{sleeping.pid}/comm").read_text() != "sleep\n":
                assert sleeping.poll() is None
            raise KeyboardInterrupt
    except NoNamespaces as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert namespaces() == before
    assert sleeping is not None and sleeping.wait(5) == -9


def test_the_demo_runs_on_five_hosts_over_a_long_line_that_breaks(
    hosts: dict[str, Host], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = run(localhost(), tmp_path / "localhost", None)
    check_whole(near)
    far = run(hosts, tmp_path / "hosts", WAY)
    with capsys.disabled():
        print(f"\n{report(near, far)}")
    check_whole(far)

    # The delay was there: two ways of it in every answer.
    assert all(ping >= 2000 * WAY.delay_s for ping in far.ping_ms.values())
    # Connections did break, with something on the way, on more than one host.
    hit = [traffic for traffic in far.traffic.values() if traffic["reset"] + traffic["dead"]]
    assert len(hit) > 1
    assert sum(traffic["bytes_lost"] for traffic in hit) > 0
    # Every host had its part, by what went over the line and by the run's own records.
    assert all(min(traffic["bytes_up"], traffic["bytes_down"]) > 10_000 for traffic in far.traffic.values())
    assert far.chunks["rollout-a"] > 0 and far.chunks["rollout-b"] > 0
    assert {role_host(worker) for worker, tokens in far.tokens.items() if tokens > 0} >= {
        "rollout-rollout-a",
        "rollout-rollout-b",
        "teacher-teacher",
    }


def role_host(worker: str) -> str:
    return worker.rsplit("-", 2)[0]


def report(near: Outcome, far: Outcome) -> str:
    """What the distance cost."""
    lines = [f"{'':30}{'localhost':>14}{'five hosts':>14}"]
    rows: list[tuple[str, object, object]] = [
        ("Redis", near.redis_version, far.redis_version),
        ("round trip of a PING, ms", *(f"{max(one.ping_ms.values()):.2f}" for one in (near, far))),
        ("trained tokens a second", *(f"{one.tokens_per_s:.0f}" for one in (near, far))),
        ("admitted", *(one.ledger["admitted"] for one in (near, far))),
        ("dropped", *(sum(one.ledger["dropped"].values()) for one in (near, far))),
        ("calls asked again", *(one.repeated_calls for one in (near, far))),
        ("processes started again", *(sum(one.restarts.values()) for one in (near, far))),
        ("connections broken", 0, sum(one["reset"] + one["dead"] for one in far.traffic.values())),
    ]
    lines += [f"{name:30}{left!s:>14}{right!s:>14}" for name, left, right in rows]
    lines.append(f"five hosts reach {far.tokens_per_s / near.tokens_per_s:.2f} of localhost's tokens a second")
    lines += [f"{name}: {traffic}" for name, traffic in far.traffic.items()]
    lines += [f"chunks by host: {dict(far.chunks)}; load {os.getloadavg()[0]:.2f}; dropped {far.ledger['dropped']}"]
    lines += [f"codes: {far.codes}"]
    return "\n".join(lines)
