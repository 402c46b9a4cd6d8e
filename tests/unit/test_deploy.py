"""deploy/ names what exists: metrics, ports, fields, recipes; and KubeRay's operator would take the manifest.

The operator's own rules are no part of its schema, so they are written out here. promtool and hadolint: tests/system.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.config import ClusterConfig, RunConfig, load_config
from services.dashboard import SECTIONS, dashboard
from services.placement import Node, plan
from workers.telemetry import METRICS, Histogram

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}


def series_names() -> set[str]:
    """Every name that a query may use."""
    ends = {name: ("_bucket", "_sum", "_count") if isinstance(m, Histogram) else ("",) for name, m in METRICS.items()}
    return {name + end for name in METRICS for end in ends[name]}


@pytest.mark.parametrize("file", ["dashboard.json", "alerts.yml", "alerts.test.yml"])
def test_every_metric_named_in_deploy_is_declared(file: str) -> None:
    text = (DEPLOY / file).read_text()
    queries = re.findall(r'(?:"expr": |"query": |expr: |series: )(.*)', text)
    named = {name for query in queries for name in re.findall(r"\bdollhouse_\w+", query)}
    assert named
    assert named <= series_names()


def test_the_dashboard_is_the_one_that_the_declarations_give() -> None:
    assert json.loads((DEPLOY / "dashboard.json").read_text()) == dashboard(), (
        "run: python -m services.dashboard > deploy/dashboard.json"
    )


def test_the_dashboard_draws_every_metric_once() -> None:
    drawn = [metric.full_name for metrics in SECTIONS.values() for metric in metrics]
    assert sorted(drawn) == sorted(METRICS)


def test_dashboard_panels_do_not_overlap() -> None:
    cells = [
        (place["x"] + column, place["y"] + row)
        for place in (panel["gridPos"] for panel in dashboard()["panels"])
        for column in range(place["w"])
        for row in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(column for column, _ in cells) < 24


def test_prometheus_and_docker_look_at_the_default_port() -> None:
    endpoint = f"{ClusterConfig().metrics_host}:{ClusterConfig().metrics_port}"
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    targets = {job["job_name"]: job.get("static_configs") for job in config["scrape_configs"]}
    assert targets["dollhouse"] == [{"targets": [endpoint]}]
    assert f"http://{endpoint}/health" in (DEPLOY / "Dockerfile").read_text()


def test_the_image_copies_every_package_and_does_not_run_as_root() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = {word.rstrip("/") for line in re.findall(r"^COPY (.*)$", dockerfile, re.M) for word in line.split()[:-1]}
    for needed in project()["tool"]["setuptools"]["packages"]["find"]["include"]:
        assert needed.rstrip("*") in copied
    assert {"pyproject.toml", "README.md", *project()["project"]["license-files"]} <= copied
    (user,) = re.findall(r"^USER (\d+)", dockerfile, re.M)
    assert (
        int(user)
        == manifest()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"]
    )


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def manifest() -> dict[str, Any]:
    (job,) = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    assert isinstance(job, dict)
    return job


def groups(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield job["spec"]["rayClusterSpec"]["headGroupSpec"]
    yield from job["spec"]["rayClusterSpec"]["workerGroupSpecs"]


def containers(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in groups(job):
        yield from group["template"]["spec"]["containers"]


def operator_errors(job: dict[str, Any]) -> set[str]:
    """Rules of KubeRay 1.7's operator that its schema does not hold (its validation of a RayJob), by field."""
    spec = job["spec"]
    cluster = spec.get("rayClusterSpec", {})
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    version = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
    auth = cluster.get("authOptions", {})
    broken = {
        "metadata.name": not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"].get("name", "")),
        "rayClusterSpec": bool(cluster) == bool(selector),
        "submissionMode": mode not in SUBMISSION_MODES,
        "suspend": bool(spec.get("suspend")) and (not spec.get("shutdownAfterJobFinishes") or bool(selector)),
        "ttlSecondsAfterFinished": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not spec.get("shutdownAfterJobFinishes"),
        "backoffLimit": spec.get("backoffLimit", 0) > 0 and (bool(selector) or mode == "InteractiveMode"),
        "submitter": mode == "SidecarMode" and bool({"submitterPodTemplate", "submitterConfig"} & spec.keys()),
        "enableK8sTokenAuth": bool(auth.get("enableK8sTokenAuth")),
        "rayVersion": auth.get("mode") == "token" and version < (2, 52, 0),
    }
    return {field for field, is_broken in broken.items() if is_broken}


def test_the_operator_takes_the_manifest() -> None:
    job = manifest()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert operator_errors(job) == set()


@pytest.mark.parametrize(
    ("field", "edit"),
    [
        ("metadata.name", lambda job: job["metadata"].update(name="Dollhouse")),
        ("metadata.name", lambda job: job["metadata"].update(name="d" * 48)),
        ("rayClusterSpec", lambda job: job["spec"].pop("rayClusterSpec")),
        ("submissionMode", lambda job: job["spec"].update(submissionMode="K8SJobMode")),
        (
            "suspend",
            lambda job: job["spec"].update(suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0),
        ),
        ("ttlSecondsAfterFinished", lambda job: job["spec"].pop("shutdownAfterJobFinishes")),
        ("backoffLimit", lambda job: job["spec"].update(submissionMode="InteractiveMode")),
        (
            "submitter",
            lambda job: job["spec"].update(submissionMode="SidecarMode", submitterConfig={"backoffLimit": 1}),
        ),
        (
            "enableK8sTokenAuth",
            lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(enableK8sTokenAuth=True),
        ),
        ("rayVersion", lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.51.1")),
    ],
)
def test_the_operator_rules_catch_a_seeded_error(field: str, edit: Callable[[dict[str, Any]], object]) -> None:
    job = manifest()
    edit(job)
    assert operator_errors(job) == {field}


def entrypoint() -> RunConfig:
    """What the entrypoint tells the product, as its own config."""
    program, command, recipe, *options = shlex.split(manifest()["spec"]["entrypoint"])
    assert (program, command) == ("dollhouse", "run")
    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert {option for option, _ in pairs} == {"--root", "--address", "--set"}
    single = dict(pairs)
    overrides = [value for option, value in pairs if option == "--set"]
    return load_config(recipe, overrides, root=single["--root"], address=single["--address"])


def test_the_entrypoint_is_a_valid_run_whose_metrics_can_be_scraped() -> None:
    cluster, head = entrypoint().cluster, manifest()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert cluster.metrics_host == "0.0.0.0"
    assert head["metadata"]["annotations"]["prometheus.io/port"] == str(cluster.metrics_port)
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    assert ports["run-metrics"] == cluster.metrics_port


def test_the_actors_of_the_entrypoint_fit_the_pods() -> None:
    pods = [
        container["resources"]["limits"]
        for group in groups(manifest())
        for container in group["template"]["spec"]["containers"]
        for _ in range(group.get("replicas", 0))  # the head, which takes no actors, has none
    ]
    placed = plan(entrypoint().cluster, [Node(int(pod["cpu"]), pod["nvidia.com/gpu"]) for pod in pods])
    for actors in (placed.harvester, placed.trainer, placed.evaluator):
        assert any(actors.num_cpus <= int(pod["cpu"]) and actors.num_gpus <= pod["nvidia.com/gpu"] for pod in pods)
    num_gpus = sum(pod["nvidia.com/gpu"] for pod in pods)
    assert placed.harvester.num_gpus * placed.harvester.num_actors <= num_gpus
    assert placed.trainer.num_gpus + placed.evaluator.num_gpus <= num_gpus


def test_the_cluster_runs_the_ray_that_the_project_pins() -> None:
    (pin,) = [need for need in project()["project"]["dependencies"] if need.startswith("ray[")]
    version = manifest()["spec"]["rayClusterSpec"]["rayVersion"]
    assert pin.endswith(f"=={version.rpartition('.')[0]}.*")


def test_every_pod_is_confined_bounded_and_free_of_secrets() -> None:
    for group in groups(manifest()):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (shm,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        (container,) = pod["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert shm["emptyDir"]["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store <= num_bytes(shm["emptyDir"]["sizeLimit"]) < num_bytes(container["resources"]["limits"]["memory"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {"secretRef": {"name": "dollhouse-s3"}} in container["envFrom"]
        assert not [variable for variable in container.get("env", []) if "value" in variable]
    assert manifest()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "dollhouse-ray-token"}


def num_bytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) << 30
