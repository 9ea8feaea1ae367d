"""ops/prometheus: configs, rules and their unit tests by promtool; rules, tests, runbook and metrics fit together."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, start_http_server
from system import need

from common.metrics import REGISTRY

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "ops" / "prometheus"
CONFIGS = ("prometheus.yml", "local.yml")
RULES = ("recording.rules.yml", "alerts.rules.yml")
TESTS = ("alerts.test.yml", "recording.test.yml")
ROLES = {"feeder", "rollout", "teacher", "arbiter", "learner", "evaluator"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@cache
def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in read(name)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.rules.yml")}
RECORDED = {rule["record"] for rule in rules("recording.rules.yml")}
EXPRESSIONS = [rule["expr"] for name in RULES for rule in rules(name)]


def promtool(*arguments: str) -> str:
    """What promtool prints, run in the folder of the configs; fails the test with it where promtool fails."""
    done = subprocess.run(
        [need("promtool"), *arguments], cwd=FOLDER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_promtool_accepts_the_config_and_finds_its_rules(name: str) -> None:
    said = promtool("check", "config", name)
    assert f"SUCCESS: {len(RULES)} rule files found" in said


@pytest.mark.parametrize("name", RULES)
def test_promtool_accepts_the_rules(name: str) -> None:
    assert f"SUCCESS: {len(rules(name))} rules found" in promtool("check", "rules", name)


@pytest.mark.slow
@pytest.mark.timeout(900)  # seconds of work; many times that on a machine that has other things to do
@pytest.mark.parametrize("name", TESTS)
def test_promtool_passes_the_unit_tests(name: str) -> None:
    promtool("test", "rules", name)


def test_every_file_is_read_by_one_of_the_above() -> None:
    assert {path.name for path in FOLDER.glob("*.yml")} == {*CONFIGS, *RULES, *TESTS}


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_stays_silent() -> None:
    cases = [case for group in read("alerts.test.yml")["tests"] for case in group["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == set(ALERTS)


def test_every_silent_case_stands_beside_series_that_its_alert_reads() -> None:
    """An alert is silent also where nothing is there to read: such a case would show nothing."""
    for group in read("alerts.test.yml")["tests"]:
        given = {re.split(r"[{ ]", item["series"])[0] for item in group["input_series"]}
        for case in group["alert_rule_test"]:
            assert given & read_by(ALERTS[case["alertname"]]["expr"]), case


def read_by(expression: str) -> set[str]:
    """Names of the series that an expression reads, through recording rules too."""
    names = set(re.findall(r"\b(?:katana_\w+|katana:[\w:]+|redis_\w+|up)\b", without_labels(expression)))
    for rule in rules("recording.rules.yml"):
        if rule["record"] in names:
            names |= read_by(rule["expr"])
    return names


def without_labels(expression: str) -> str:
    return re.sub(r"\{[^}]*\}", "", expression)


def test_every_recording_rule_has_a_value_in_the_tests() -> None:
    cases = [case for group in read("recording.test.yml")["tests"] for case in group["promql_expr_test"]]
    tested = {name for case in cases if case["exp_samples"] for name in recorded_in(case["expr"])}
    assert tested == RECORDED


def recorded_in(expression: str) -> set[str]:
    return set(re.findall(r"\bkatana:[\w:]+", without_labels(expression)))


def test_rules_use_metrics_and_recording_rules_that_exist() -> None:
    served = {family.name + suffix for family in REGISTRY.collect() for suffix in SUFFIXES[family.type]}
    used = {name for text in EXPRESSIONS for name in re.findall(r"\bkatana_\w+", without_labels(text))}
    assert used - served == set()
    assert {name for text in EXPRESSIONS for name in recorded_in(text)} - RECORDED == set()


def test_names_of_recording_rules_say_level_metric_and_operation() -> None:
    assert [name for name in RECORDED if not re.fullmatch(r"katana:[a-z_]+:[a-z][a-z0-9_]*", name)] == []


def test_every_alert_says_what_how_bad_and_where_to_read_on() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sections == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        about = rule["annotations"]
        assert set(about) == {"summary", "description", "runbook_url"}
        assert about["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert "$labels" in about["summary"] and "$value" in about["description"]


def test_every_section_of_the_runbook_says_how_bad_what_to_look_at_and_what_to_do() -> None:
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "runbook.md").read_text(), flags=re.MULTILINE)
    for section in sections:
        name = section.split()[0]
        assert f"*{ALERTS[name]['labels']['severity']}.*" in section, name
        assert re.search(r"^Look at", section, re.MULTILINE) and re.search(r"^Do: ", section, re.MULTILINE), name


def test_the_jobs_of_the_cluster_are_the_roles() -> None:
    jobs = {job["job_name"]: job for job in read("prometheus.yml")["scrape_configs"]}
    assert set(jobs) == ROLES | {"redis", "prometheus", "vllm"}
    for role in ROLES:
        (found,) = jobs[role]["dns_sd_configs"]
        assert (found["names"], found["type"], found["port"]) == ([role], "A", 9464)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(**values: float) -> Iterator[int]:
    """Gauges of a run `mine` on a port, as a process of that run would serve them."""
    registry = CollectorRegistry()
    for name, value in values.items():
        Gauge(name, name, ["run"], registry=registry).labels("mine").set(value)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def prometheus(config: Path, data: Path) -> Iterator[str]:
    """The address of a Prometheus that runs by a config."""
    address = f"127.0.0.1:{free_port()}"
    command = [need("prometheus"), "--config.file", config, "--storage.tsdb.path", data]
    with subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield address
        finally:
            process.terminate()


def ask(address: str, expression: str) -> list[dict[str, str]]:
    """Labels of the series that an expression gives now; none while Prometheus starts."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=5) as answer:
            return [series["metric"] for series in json.load(answer)["data"]["result"]]
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_prometheus_finds_a_process_of_this_machine_by_its_file(tmp_path: Path) -> None:
    """By local.yml as it stands: the job is the role, the run comes through unrenamed, alerts see what is served."""
    folder = tmp_path / "ops" / "prometheus"
    shutil.copytree(FOLDER, folder)
    (pattern,) = read("local.yml")["scrape_configs"][0]["file_sd_configs"][0]["files"]
    targets = (folder / pattern).parent.resolve()
    assert targets.is_relative_to(tmp_path)
    targets.mkdir(parents=True)
    with served(katana_redis_memory_ratio=0.9) as port, prometheus(folder / "local.yml", tmp_path / "data") as address:
        where = {"targets": [f"127.0.0.1:{port}"], "labels": {"job": "feeder", "run": "mine"}}
        (targets / "mine--feeder.json").write_text(json.dumps([where]))
        deadline = time.monotonic() + 60
        while not (alerts := ask(address, 'ALERTS{alertname="KatanaRedisMemoryHigh"}')) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert [(alert["run"], alert["alertstate"]) for alert in alerts] == [("mine", "pending")]
        (series,) = ask(address, "katana_redis_memory_ratio")
        assert (series["job"], series["run"]) == ("feeder", "mine") and "exported_run" not in series
