"""docker-compose.yml, .env, Dockerfile, ops/docker/: the rules that they keep. No container is started."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import load
from ops.cli.main import command_line

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "ops" / "docker"
ROLES = ("feeder", "rollout", "teacher", "arbiter", "learner", "evaluator")
OF_PROFILES = ("gpu", "vllm")  # whose services of a role have a name of their own, `ROLE-PROFILE`
ONE_SHOT = ("init", "operator")  # they do one thing and end: nothing to ask for their health, nothing to restart
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def _compose(text: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(VARIABLE.sub(lambda match: match[2], text))
    return tree


TEXT = (ROOT / "docker-compose.yml").read_text()
TREE = _compose(TEXT)
SERVICES: dict[str, Any] = TREE["services"]
each_service = pytest.mark.parametrize("name", SERVICES)


def _mounts(name: str) -> dict[str, str]:
    """Target → source of a service's volumes."""
    pairs = (item.split(":") for item in SERVICES[name].get("volumes", []))
    return {parts[1]: parts[0] for parts in pairs}


@each_service
def test_no_service_is_root_or_can_become_it(name: str) -> None:
    service = SERVICES[name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service


@each_service
def test_every_service_has_limits_and_time_to_drain(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert 0 < service["pids_limit"] <= (4096 if name == "vllm" else 256)  # it has threads for each core
    assert int(service["stop_grace_period"].removesuffix("s")) > 20  # what the README promises
    assert service["logging"]["options"]["max-size"]


@each_service
def test_every_service_is_watched_and_started_again(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no" and "healthcheck" not in service
        return
    assert service["restart"] == ("on-failure" if _ends_with_a_run(name) else "unless-stopped")
    test = service["healthcheck"]["test"]
    if (role := _role_of(name)) in ROLES:
        # A large checkpoint is written or restored in one turn of the loop.
        patience = ["--within", "600"] if role in ("learner", "evaluator") else []
        assert test == ["CMD", "katana-role", "health", role, *patience]
    assert test


def _role_of(name: str) -> str:
    """What a service is, in whichever profile."""
    role, _, profile = name.rpartition("-")
    return role if profile in OF_PROFILES else name


def _ends_with_a_run(name: str) -> bool:
    return _role_of(name) in ("feeder", "arbiter", "learner", "evaluator")


@each_service
def test_images_are_ours_or_pinned(name: str) -> None:
    image = SERVICES[name]["image"]
    if image.startswith("katana:"):
        assert "build" in SERVICES[name] or SERVICES[name]["pull_policy"] == "never"
    else:
        assert re.fullmatch(r"[a-z0-9_/-]+:v?\d+\.\d+\.\d+(-[a-z]+)?", image)


def test_each_of_our_images_is_built_once() -> None:
    built = {service["image"]: service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == {"katana:cpu": "cpu", "katana:gpu": "gpu"}
    for profile in ("cpu", *OF_PROFILES):  # and whatever is started together is built together
        names = _in_profile(profile)
        ours = {SERVICES[name]["image"] for name in names} & set(built)
        assert ours <= {SERVICES[name]["image"] for name in names if "build" in SERVICES[name]}, profile
    dockerfile = (ROOT / "Dockerfile").read_text()
    for target in built.values():
        assert re.search(rf"^FROM runtime AS {target}$", dockerfile, re.MULTILINE)
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    base = re.search(r"^ARG PYTHON_IMAGE=(.+)$", dockerfile, re.MULTILINE)
    assert base is not None and re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base[1])


def test_both_images_are_built_from_what_the_environment_names() -> None:
    for service in (one for one in SERVICES.values() if "build" in one):
        assert set(service["build"]["args"]) == {"PIP_INDEX_URL", "TORCH_CPU_INDEX_URL", "EXTRAS"}
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name in ("PIP_INDEX_URL", "TORCH_CPU_INDEX_URL", "EXTRAS"):
        assert re.search(rf"^ARG {name}=$", dockerfile, re.MULTILINE), "what is not set comes as empty"
    assert '"${TORCH_CPU_INDEX_URL:-https://download.pytorch.org/whl/cpu}"' in dockerfile


@pytest.mark.parametrize(("extras", "named"), [("", ()), ("tensorboard wandb", ("tensorboard", "wandb"))])
def test_the_image_has_the_dependencies_and_the_extras_that_are_asked_for(
    tmp_path: Path, extras: str, named: tuple[str, ...]
) -> None:
    requirements = _requirements(tmp_path, extras)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [line for name in named for line in project["optional-dependencies"][name]]
    assert requirements.stdout == "" and requirements.returncode == 0, requirements.stderr
    assert (tmp_path / "requirements.txt").read_text().splitlines() == [*project["dependencies"], *wanted]


def test_an_extra_that_is_not_known_ends_the_build(tmp_path: Path) -> None:
    done = _requirements(tmp_path, "tensorbored")
    assert done.returncode != 0 and "tensorbored" in done.stderr


def _requirements(folder: Path, extras: str) -> subprocess.CompletedProcess[str]:
    """Do what the Dockerfile does to list the packages."""
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    found = re.search(r"^RUN (.*> requirements\.txt)$", dockerfile, re.MULTILINE)
    assert found is not None
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "EXTRAS": extras}
    return subprocess.run(["sh", "-c", found[1]], cwd=folder, env=env, capture_output=True, text=True, timeout=20)


def test_what_the_image_takes_from_the_checkout_may_be_read_whatever_the_umask() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (ops/.*) (\S+)/$", dockerfile, re.MULTILINE)
    files = [f"{target}/{Path(source).name}" for sources, target in copied for source in sources.split()]
    rights = dict.fromkeys(files, "") | {
        path: mode
        for mode, paths in re.findall(r"chmod (0\d+) ([^&\n]+)", dockerfile)
        for path in paths.split()
        if path in files
    }
    assert rights == {
        "/usr/local/bin/katana-role": "0755",
        "/usr/local/bin/make-secrets": "0755",
        "/etc/katana/users.acl": "0644",
    }
    assert dockerfile.index("chmod") < dockerfile.index("USER 10001")


def test_no_model_of_yours_gets_into_the_image() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def goes_in(path: str) -> bool:
        """As Docker reads it: the last rule that fits the path or a folder above it."""
        above = [path, *map(str, Path(path).parents)]
        fits = [
            rule
            for rule in rules
            if any(fnmatch(one, rule.lstrip("!")) for one in above if rule.count("/") == one.count("/"))
        ]
        return bool(fits) and fits[-1].startswith("!")

    assert goes_in("ops/cli/main.py") and goes_in("ops/report/html/report.js") and goes_in("common/wire/lua/again.lua")
    assert goes_in("ops/models/student/model.safetensors") and goes_in("ops/models/teacher/tokenizer.json")
    assert not goes_in("ops/models/mine/model.safetensors") and not goes_in("ops/models/mine.safetensors")
    assert not goes_in("runs/demo/config.yaml") and not goes_in(".git/config")


def test_only_grafana_and_prometheus_are_seen_from_outside_and_only_on_this_host() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"grafana": ["127.0.0.1:3000:3000"], "prometheus": ["127.0.0.1:9090:9090"]}
    assert TREE["networks"]["inside"] == TREE["networks"]["engine"] == {"internal": True}
    for name, service in SERVICES.items():
        networks = set(service.get("networks", [])) - {"engine"}
        nowhere = name in ("init", "vllm")
        assert networks == ({"inside", "front"} if name in published else set() if nowhere else {"inside"})
    assert SERVICES["init"]["network_mode"] == "none"


def test_only_those_who_ask_vllm_to_write_and_prometheus_reach_it() -> None:
    """Its routes for weights ask nobody for a password."""
    there = {name for name, service in SERVICES.items() if "engine" in service.get("networks", [])}
    assert there == {"vllm", "rollout-vllm", "prometheus"}
    assert set(SERVICES["vllm"]["networks"]) == {"engine"} and "ports" not in SERVICES["vllm"]


def test_mounted_files_are_there_and_read_only_and_volumes_declared() -> None:
    used = set()
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source, _, *rights = mount.split(":")
            if source.startswith("."):
                assert (ROOT / source).exists() and rights == ["ro"], mount
            else:
                used.add(source)
    assert used == set(TREE["volumes"])


def test_a_service_sees_no_password_but_its_own() -> None:
    owners = {"redis-data": "redis", "redis-broker": "redis", "redis-exporter": "exporter"}
    for name in SERVICES:
        secrets = {target: source for target, source in _mounts(name).items() if target.startswith("/secrets/")}
        if name == "init":
            users = re.findall(r"^user (\w+)", (ROOT / "ops" / "redis" / "users.acl").read_text(), re.MULTILINE)
            assert set(secrets) == {f"/secrets/{user}" for user in (*users, "redis", "exporter")}
            folders = re.search(r"for name in ([\w ]+); do", (ROOT / "Dockerfile").read_text())
            assert folders is not None and set(folders[1].split()) == {Path(target).name for target in secrets}
        elif name in ("prometheus", "grafana", "vllm"):
            assert secrets == {}
        else:
            owner = owners.get(name, _role_of(name))
            assert secrets == {f"/secrets/{owner}": f"secret-{owner}"}


def test_plain_up_is_the_cpu_cluster_and_the_gpu_profile_is_the_same_roles() -> None:
    env = (ROOT / ".env").read_text()
    assert re.findall(r"^(\w+=.*)$", env, re.MULTILINE) == ["COMPOSE_PROFILES=cpu"]
    assert set(_in_profile("cpu")) - set(_in_profile("none")) == set(ROLES) - {"arbiter"}
    gpu = set(_in_profile("gpu")) - set(_in_profile("none"))
    assert gpu == {f"{role}-gpu" for role in ROLES if role != "arbiter"}
    for name in gpu:
        service, role = SERVICES[name], name.removesuffix("-gpu")
        assert service["networks"]["inside"]["aliases"] == [role] and service["command"] == [role]
        assert ("deploy" in service) == (role != "feeder")
    assert SERVICES["feeder-gpu"]["environment"]["KATANA_DEVICE"] == "cuda"


def test_the_profile_vllm_is_the_one_of_gpus_with_a_server_that_writes() -> None:
    found = set(_in_profile("vllm")) - set(_in_profile("none"))
    assert found == {"feeder-vllm", "rollout-vllm", "teacher-gpu", "learner-gpu", "evaluator-gpu", "vllm"}
    for role in ("feeder", "rollout"):
        service = SERVICES[f"{role}-vllm"]
        assert service["networks"]["inside"]["aliases"] == [role] and service["command"] == [role]
        assert service["image"] == "katana:cpu" and "deploy" not in service  # they hold no model
    assert SERVICES["feeder-vllm"]["environment"] == {
        **SERVICES["feeder-gpu"]["environment"],
        "KATANA_VLLM_URLS": "http://vllm:8000",
    }


def test_the_vllm_server_has_what_katana_asks_of_it_and_sees_the_weights_that_are_published() -> None:
    service = SERVICES["vllm"]
    assert service["image"] == "vllm/vllm-openai:v0.32.0"
    model, *flags = service["command"].split()
    assert model == "/models/student" and "--enable-scale-out" in flags and "--enable-prefix-caching" in flags
    given = dict(itertools.pairwise(flags))
    assert (given["--logprobs-mode"], given["--block-size"], given["--port"]) == ("raw_logprobs", "16", "8000")
    config = load(ROOT / "ops" / "experiments" / "qwen3-math.yaml")
    assert int(given["--max-logprobs"]) > config.termination.teacher_top_k + 8  # and a place for each stop id
    assert service["environment"]["VLLM_SERVER_DEV_MODE"] == "1"
    rollout = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["rollout-vllm"]["volumes"]}
    for folder in ("/runs", "/models"):  # the same path in both: the server is told which folder to read
        assert f"{rollout[folder]}:{folder}:ro" in service["volumes"]
    assert service["user"].split(":")[0] == SERVICES["rollout-vllm"]["user"].split(":")[0]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    check = service["healthcheck"]
    assert check["start_period"] == "600s" and "/health" in check["test"][-1]
    # What is compiled into /tmp is loaded from there, and a read-only container has no other place to write to.
    assert service["tmpfs"] == ["/tmp:exec,size=8g,mode=1777"] and service["environment"]["HOME"] == "/tmp"


def test_the_feeder_tells_rollout_workers_which_servers_write(role_arguments: Any) -> None:
    demo = ROOT / "ops" / "experiments" / "demo.yaml"
    assert load(demo, role_arguments("feeder")[3::2]).rollout.engine == "slots"
    told = role_arguments("feeder", KATANA_VLLM_URLS="http://vllm:8000,http://vllm-1:8000", KATANA_DEVICE="cuda")
    rollout = load(demo, told[3::2]).rollout
    assert rollout.engine == "vllm" and [*rollout.vllm.urls] == ["http://vllm:8000", "http://vllm-1:8000"]


def test_a_learner_of_two_ranks_is_one_variable(role_arguments: Any) -> None:
    """The feeder hands their number to the learner with the run's config; on GPUs the container gets as many."""
    assert load(ROOT / "ops" / "experiments" / "demo.yaml", role_arguments("feeder")[3::2]).learner.nproc_per_node == 1
    two = role_arguments("feeder", KATANA_LEARNER_RANKS="2", KATANA_DEVICE="cuda")
    learner = load(ROOT / "ops" / "experiments" / "demo.yaml", two[3::2]).learner
    assert [learner.device_of(rank) for rank in range(learner.nproc_per_node)] == ["cuda", "cuda:1"]
    text = TEXT.replace("${KATANA_LEARNER_RANKS:-}", "2").replace("${KATANA_LEARNER_RANKS:-1}", "2")
    services = _compose(text)["services"]
    assert services["feeder"]["environment"]["KATANA_LEARNER_RANKS"] == 2
    for name in ("learner-gpu", "evaluator-gpu"):
        [device] = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert int(device["count"]) == (2 if name == "learner-gpu" else 1)


def test_several_teachers_are_a_service_each_in_place_of_the_one() -> None:
    """The file on top of docker-compose.yml: what it extends is there, and it gives each the name of a teacher."""
    names = list(load(ROOT / "ops" / "experiments" / "demo-teachers.yaml").teachers)
    several = yaml.safe_load((ROOT / "docker-compose.teachers.yml").read_text())["services"]
    assert {name for name, service in several.items() if service == {"scale": 0}} == {"teacher", "teacher-gpu"}
    for profile, suffix in (("cpu", ""), ("gpu", "-gpu")):
        for name in names:
            service = several[f"teacher-{name}{suffix}"]
            assert service["extends"] == {"file": "docker-compose.yml", "service": f"teacher{suffix}"}
            assert profile in SERVICES[service["extends"]["service"]]["profiles"]
            assert service["environment"] == {"KATANA_TEACHER": name}
            merged = SERVICES[f"teacher{suffix}"]["networks"] if suffix else service["networks"]
            assert merged["inside"]["aliases"] == ["teacher"]  # where Prometheus looks
    assert len(several) == 2 + 2 * len(names)


def test_a_container_of_a_teacher_is_told_which_and_the_feeder_gives_each_its_device(role_arguments: Any) -> None:
    several = ROOT / "ops" / "experiments" / "demo-teachers.yaml"
    of_one = role_arguments("teacher", KATANA_EXPERIMENT="demo-teachers", KATANA_TEACHER="shifted")
    assert of_one[:4] == ["teacher", "/experiments/demo-teachers.yaml", "--teacher", "shifted"]
    assert command_line().parse_args([*of_one[:1], str(several), *of_one[2:]]).teacher == "shifted"
    for other in (("feeder",), ("health", "teacher")):
        assert "--teacher" not in role_arguments(*other, KATANA_TEACHER="shifted")
    told = role_arguments("feeder", KATANA_DEVICE="cuda", KATANA_TEACHERS="plain shifted")
    config = load(several, told[3::2])
    assert {teacher.device for teacher in config.teachers.values()} == {config.rollout.device} == {"cuda"}


def _in_profile(profile: str) -> list[str]:
    return [name for name, service in SERVICES.items() if profile in service.get("profiles", [profile])]


def test_every_variable_is_named_in_env_with_its_default() -> None:
    listed = dict(re.findall(r"^#(\w+)=(.*)$", (ROOT / ".env").read_text(), re.MULTILINE))
    used = dict(VARIABLE.findall(TEXT))
    assert set(listed) == set(used)
    for name, default in used.items():
        # A folder of one's own is shown by an example, as is what is empty by default.
        if default and not name.endswith(("_EXPERIMENTS", "_MODELS", "_RUNS")):
            assert listed[name] == default, name


def test_nothing_runs_scaled_by_name() -> None:
    assert not any("container_name" in service or "hostname" in service for service in SERVICES.values())


def test_prometheus_looks_for_services_that_are_there() -> None:
    config = yaml.safe_load((ROOT / "ops" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for role in ROLES:
        (found,) = jobs[role]["dns_sd_configs"]
        assert (found["names"], found["port"]) == ([role], 9464)
    (found,) = jobs["vllm"]["dns_sd_configs"]
    assert (found["names"], found["port"]) == (["vllm"], 8000)
    (redis,) = jobs["redis"]["static_configs"]
    assert {target.removeprefix("redis://").removesuffix(":6379") for target in redis["targets"]} <= set(SERVICES)


@pytest.fixture
def role_arguments(tmp_path: Path) -> Any:
    """`role_arguments("feeder", KATANA_SET=…)`: what `katana` is called with in a container."""
    fake = tmp_path / "katana"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)

    def call(*words: str, **env: str) -> list[str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", str(DOCKER / "katana-role"), *words],
            env={"PATH": path, **env},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.splitlines()

    return call


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_started_and_asked_with_the_same_valid_config(role: str, role_arguments: Any) -> None:
    started = role_arguments(role, KATANA_SET="learner.max_steps=7 seed=3", KATANA_DEVICE="cuda")
    assert started[:2] == [role, "/experiments/demo.yaml"]
    asked = role_arguments("health", role, KATANA_SET="learner.max_steps=7 seed=3", KATANA_DEVICE="cuda")
    assert asked == ["health", *started]
    assert set(started[2::2]) == {"--set"}
    config = load(ROOT / "ops" / "experiments" / "demo.yaml", started[3::2])
    assert (config.learner.max_steps, config.seed, config.learner.device) == (7, 3, "cuda")
    assert (config.runs_dir, config.metrics.host, config.metrics.port) == ("/runs", "0.0.0.0", 9464)
    access = config.redis.access(role)
    assert (access["username"], access["password_file"]) == (role, f"/secrets/{role}/password")
    assert {config.redis.url, config.redis.broker} == {"redis://redis-data:6379/0", "redis://redis-broker:6379/0"}


def test_a_health_check_may_be_told_more(role_arguments: Any) -> None:
    asked = role_arguments("health", "learner", "--within", "600")
    assert asked[:5] == ["health", "learner", "/experiments/demo.yaml", "--within", "600"]
    assert set(asked[5::2]) == {"--set"}


def test_the_experiment_is_one_variable_and_other_commands_pass_as_they_are(role_arguments: Any) -> None:
    assert role_arguments("feeder", KATANA_EXPERIMENT="none")[1] == "/experiments/none.yaml"
    assert role_arguments("dead", "/runs/demo/config.yaml") == ["dead", "/runs/demo/config.yaml"]
    assert load(ROOT / "ops" / "experiments" / "demo.yaml", role_arguments("feeder")[3::2]).learner.device == "cpu"


@pytest.mark.parametrize("script", ["katana-role", "make-secrets", "redis-health"])
def test_scripts_are_posix_and_may_be_run(script: str) -> None:
    path = DOCKER / script
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(path)], check=True, timeout=20)
