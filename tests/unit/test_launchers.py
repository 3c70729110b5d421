"""The launcher files for Google Cloud, for machines of one's own, and for Kubernetes; AWS as far as
its API is asked before there is a machine to log in to."""

import copy
import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import moto
import pydantic
import pytest
import typer
import yaml

from cluster import cli, loading, panels
from cluster.autoscaling import growth_of
from cluster.config import ServeSection
from serving import deploy
from tests import manifests
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster/launchers"
RAY_UP = {
    "aws": ROOT / "cluster.yaml",
    "gcp": FOLDER / "gcp.yaml",
    "local": FOLDER / "on-prem.yaml",
}
MONITORING = FOLDER / "kuberay/monitoring.yaml"
REGISTRY = FOLDER / "kuberay/mlflow.yaml"
BESIDE = (MONITORING, REGISTRY)
KUBERAY = sorted(path for path in (FOLDER / "kuberay").glob("*.yaml") if path not in BESIDE)


def text(path: Path) -> str:
    return path.read_text("utf-8")


def tree(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text(path))
    return found


@pytest.fixture(params=RAY_UP)
def launcher(request: pytest.FixtureRequest) -> dict[str, Any]:
    return tree(RAY_UP[request.param])


def test_ray_accepts_it(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text())
    jsonschema.validate(launcher, schema)
    validate_config(prepare_config(copy.deepcopy(launcher)))


def test_every_node_starts_with_the_token_and_the_dashboard_on_loopback(
    launcher: dict[str, Any],
) -> None:
    assert launcher["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in launcher["setup_commands"][0]
    for kind in ("head", "worker"):
        start = next(c for c in launcher[f"{kind}_start_ray_commands"] if "ray start" in c)
        before = start.partition("ray start")[0]
        assert "export RAY_AUTH_MODE=token;" in before and " RAY_worker_niceness=5 " in before
        # See `cluster.proxy.haproxy`.
        assert "BINARY_PATH=$HOME/heliostat-venv/bin/heliostat-haproxy" in before
        assert "0.0.0.0" not in start
        assert ("--dashboard-host=127.0.0.1" in start) == (kind == "head")


PAGES = {"mlflow": (5000, "server"), "heliostat": (9090, "monitor")}
"""Program -> its port and its command."""


def test_the_head_has_its_pages(launcher: dict[str, Any]) -> None:
    """MLflow, Prometheus and Grafana, all on loopback."""
    starts = launcher["head_start_ray_commands"]
    (registry,) = (c for c in starts if "mlflow server" in c)
    assert "--host 127.0.0.1 --port 5000" in " ".join(registry.split())
    (monitor,) = (c for c in starts if "bin/heliostat monitor" in c)
    # It asks Ray's dashboard, which has to be there, and takes the token from its file.
    assert starts.index(monitor) > next(n for n, c in enumerate(starts) if "ray start" in c)
    words = shlex.split(monitor.partition("bin/heliostat ")[2].partition(">")[0])
    command = typer.main.get_command(cli.app)
    with command.make_context("heliostat", words[:1], resilient_parsing=True) as context:
        verb = command.get_command(context, words[0])  # type: ignore[attr-defined]
        verb.make_context("monitor", words[1:])
    for workers in (launcher["worker_start_ray_commands"], launcher["worker_setup_commands"]):
        assert not any(name in c for c in workers for name in ("mlflow", "monitor", "grafana"))


@pytest.mark.parametrize("program", PAGES)
def test_a_page_is_started_once(launcher: dict[str, Any], program: str, tmp_path: Path) -> None:
    """As `ray up` runs it: through a shell whose own arguments are the command."""
    port, verb = PAGES[program]
    folder = tmp_path / "heliostat-venv/bin"
    folder.mkdir(parents=True)
    (folder / program).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\n')
    (folder / program).chmod(0o755)
    starts = launcher["head_start_ray_commands"]
    (command,) = (c for c in starts if f"bin/{program} {verb}" in c)
    command = command.replace(f"127.0.0.1/{port}", f"127.0.0.1/{(mine := free_port())}")

    def run() -> list[str]:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=30)
        deadline = time.monotonic() + 10
        started = tmp_path / "started"
        # The shell makes the file before it writes to it.
        while not (started.exists() and started.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        return started.read_text().splitlines()

    assert len(run()) == 1
    with socket.create_server(("127.0.0.1", mine)):
        run()
        time.sleep(0.5)  # what was started wrongly would write by now
        assert len(run()) == 1


def test_every_command_is_one_that_a_shell_reads(launcher: dict[str, Any]) -> None:
    for key in launcher:
        if key.endswith("_commands"):
            for command in launcher[key]:
                read = subprocess.run(
                    ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
                )
                assert read.returncode == 0 and not read.stderr, f"{command}: {read.stderr}"


def test_a_cloud_without_its_pages_is_still_a_cluster(tmp_path: Path) -> None:
    """Set-up goes on where the packages cannot be had."""
    (tmp_path / "sudo").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "sudo").chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    for cloud in ("aws", "gcp"):
        optional = [c for c in tree(RAY_UP[cloud])["head_setup_commands"] if "apt-get" in c]
        assert len(optional) == 2
        for command in optional:
            done = subprocess.run(
                [bash, "-c", command],
                env={"PATH": str(tmp_path)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0 and done.stdout.startswith("no "), done


def test_kubernetes_is_watched_too() -> None:
    monitor, source = (manifests.read(part) for part in yaml.safe_load_all(text(MONITORING)))
    assert isinstance(monitor, manifests.PodMonitor) and isinstance(source, manifests.ConfigMap)
    for path in KUBERAY:
        policy = list(yaml.safe_load_all(text(path)))[1]
        assert monitor.spec.selector.matchExpressions[0].key == "ray.io/cluster"
        assert policy["spec"]["ingress"][-1]["ports"] == [{"protocol": "TCP", "port": 8080}]
    (given,) = yaml.safe_load(source.data["heliostat.yaml"])["datasources"]
    assert (given["uid"], given["type"]) == (panels.SOURCE, "prometheus")


def test_kubernetes_has_a_registry_for_rays_pods_alone() -> None:
    deployment, claim, service, policy = map(manifests.read, yaml.safe_load_all(text(REGISTRY)))
    assert isinstance(deployment, manifests.Deployment)
    assert isinstance(claim, manifests.PersistentVolumeClaim)
    assert isinstance(service, manifests.Service)
    assert isinstance(policy, manifests.NetworkPolicy)
    labels = deployment.spec.template.metadata.labels
    assert labels == deployment.spec.selector.matchLabels == service.spec.selector
    assert labels == policy.spec.podSelector.matchLabels
    (server,) = deployment.spec.template.spec.containers
    (port,), (door,) = service.spec.ports, policy.spec.ingress
    assert {port.targetPort, *(p.containerPort for p in server.ports)} == {5000}
    assert [p.port for p in door.ports] == [5000]
    assert [p.podSelector and p.podSelector.matchExpressions[0].key for p in door.from_] == [
        "ray.io/cluster"
    ]
    # Its database lies on the disk that outlives it.
    (mount,), (volume,) = server.volumeMounts, deployment.spec.template.spec.volumes
    assert mount.name == volume.name and f"sqlite:///{mount.mountPath}/" in " ".join(server.command)
    assert volume.persistentVolumeClaim.claimName == claim.metadata.name
    # Commands tell drivers the address that it answers to.
    address = f"{service.metadata.name}:{port.port}"
    assert address in server.command[server.command.index("--allowed-hosts") + 1].split(",")
    for path in KUBERAY:
        assert ("registry.uri=" in text(path)) == (f"registry.uri=http://{address}" in text(path))
        for container in yaml.safe_load_all(text(path)):
            assert server.image in str(container) or container["kind"] == "NetworkPolicy"


def test_mlflow_knows_the_registrys_command() -> None:
    from mlflow.cli import server

    deployment = manifests.read(next(yaml.safe_load_all(text(REGISTRY))))
    assert isinstance(deployment, manifests.Deployment)
    program, verb, *options = deployment.spec.template.spec.containers[0].command
    with server.make_context("server", options) as context:
        assert context.params["port"] == 5000
    assert (program, verb) == ("mlflow", "server")


def test_jobs_say_what_their_groups_may_grow_to() -> None:
    """KubeRay's autoscaler tells nobody, and no worker is there before there is work."""
    for name in ("raycluster", "rayjob"):
        path = FOLDER / f"kuberay/{name}.yaml"
        ours = manifests.read(next(yaml.safe_load_all(text(path))))
        words = shlex.split(ours.spec.entrypoint if name == "rayjob" else commands(path)[-1])
        settings = loading.load("gpt-demo", [word for word in words if "=" in word])
        found = {"GPU": 0, "CPU": 0}
        for group in ours.cluster.workerGroupSpecs:
            limits = group.template.spec.containers[0].resources.limits
            for key, there in (("GPU", "nvidia.com/gpu"), ("CPU", "cpu")):
                found[key] += group.maxReplicas * int(limits.get(there, 0))
        assert settings.train.workers == 8 <= settings.ray.grows_to["GPU"]
        assert all(amount <= found[key] for key, amount in settings.ray.grows_to.items())


def test_data_and_training_are_sent_to_their_nodes() -> None:
    for path in (RAY_UP["aws"], RAY_UP["gcp"], FOLDER / "kuberay/raycluster.yaml"):
        (words,) = (shlex.split(c) for c in commands(path) if c.startswith("heliostat submit"))
        settings = loading.load("gpt-demo", [word for word in words if "=" in word])
        assert settings.prepare.labels == {"role": "data"}, path
        assert settings.train.labels == {"role": "gpu"}, path


def test_own_hosts_are_told_how_to_close_their_ports() -> None:
    """Both ways say the same: SSH, the service, the hosts among themselves."""
    lines = [line.lstrip("# ") for line in text(RAY_UP["local"]).splitlines()]
    ufw = [line.split() for line in lines if line.startswith("ufw allow")]
    nft = [line.split() for line in lines if line.startswith("ip saddr")]
    assert {(rule[3], rule[7] if len(rule) > 4 else "") for rule in ufw} == {
        (rule[2], rule[5] if len(rule) > 4 else "") for rule in nft
    }
    assert {rule[5] for rule in nft if len(rule) > 4} == {"22", "8000"}
    assert any("policy drop" in line for line in lines) and "ufw default deny incoming" in lines


def test_set_up_is_pinned_and_takes_a_new_build(launcher: dict[str, Any]) -> None:
    first, second, third = (c for c in launcher["setup_commands"] if "pip install" in c)
    pins = dict(x.split("==") for x in text(ROOT / "constraints.txt").split() if "==" in x)
    assert first.endswith(f"pip install torch=={pins['torch']}")
    assert "-c ~/heliostat-install/constraints.txt" in second
    assert "--no-deps --force-reinstall" in third
    assert launcher["file_mounts"]["~/heliostat-install/constraints.txt"] == "constraints.txt"


@pytest.mark.parametrize("path", [*RAY_UP.values(), *KUBERAY], ids=lambda path: path.name)
def test_no_secret_stands_in_a_launcher_file(path: Path) -> None:
    for word in ("RAY_AUTH_TOKEN=", "AWS_SECRET", "password", "BEGIN "):
        assert word not in text(path)
    assert path.name in ("rayjob.yaml", "rayservice.yaml") or "heliostat cluster" in text(path)


def commands(path: Path) -> list[str]:
    """`heliostat` commands that a file's head tells the reader to type, lines joined."""
    lines = text(path).replace("\\\n#", " ").splitlines()
    told = [line.lstrip("# ") for line in lines if line.startswith("#   heliostat ")]
    return [" ".join(line.partition("   #")[0].split()) for line in told]


@pytest.mark.parametrize("path", [*RAY_UP.values(), *KUBERAY], ids=lambda path: path.name)
def test_the_commands_that_it_tells_are_ours(path: Path) -> None:
    for command in commands(path):
        _, verb, *rest = shlex.split(command)
        if verb == "submit":
            loading.load(rest[1], [word for word in rest[2:] if "=" in word])
        else:
            assert verb == "cluster" and rest in (["token"], ["check"]), command


def test_workers_come_and_go_and_tell_what_they_are() -> None:
    for path in (RAY_UP["aws"], RAY_UP["gcp"]):
        launcher = tree(path)
        kinds = launcher["available_node_types"]
        assert kinds.pop(launcher["head_node_type"])["resources"] == {"CPU": 0, "GPU": 0}
        assert {name: kind["labels"] for name, kind in kinds.items()} == {
            "gpu-spot": {"role": "gpu", "market": "spot"},
            "gpu-on-demand": {"role": "gpu", "market": "on-demand"},
            "cpu-data": {"role": "data", "market": "spot"},
        }
        assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
        assert launcher["idle_timeout_minutes"] > 0
        starts = " ".join(launcher["head_start_ray_commands"])
        assert "mlflow server --host 127.0.0.1 --port 5000" in starts


def test_amazon_is_asked_for_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray up` against moto's EC2 and IAM, to the point where it would log in."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    # A new role takes Amazon some seconds to know everywhere, which Ray waits for.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):  # type: ignore[typeddict-item]
        iam = boto3.client("iam")
        iam.create_instance_profile(InstanceProfileName="heliostat-storage")  # the user's own
        ec2 = boto3.client("ec2", region_name="us-west-2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        launcher = yaml.safe_load(text(RAY_UP["aws"]).replace("ami-REPLACE-ME", image))
        config = bootstrap_aws(prepare_config(launcher))
        # So much may a run have, by the file as the head gets it.
        assert growth_of(config).limits()["GPU"] == 64
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, kind in config["available_node_types"].items():
            labels = {"ray-user-node-type": name, "ray-node-kind": "worker"}
            if name != "gpu-on-demand":  # one each of the others
                provider.create_node(dict(kind["node_config"]), labels, 1)
        made = [
            instance
            for reservation in ec2.describe_instances()["Reservations"]
            for instance in reservation["Instances"]
        ]
        assert sorted(instance["InstanceType"] for instance in made) == [
            "g6.12xlarge",
            "m6i.2xlarge",
            "m6i.4xlarge",
        ]
        assert sum(i.get("InstanceLifecycle") == "spot" for i in made) == 2
        groups = {group["GroupId"] for instance in made for group in instance["SecurityGroups"]}
        rules = ec2.describe_security_groups(GroupIds=list(groups))["SecurityGroups"]
        check_closed(rules)


def check_closed(groups: list[dict[str, Any]]) -> None:
    """From outside of the group only SSH, and the service from private addresses."""
    assert [group["GroupName"] for group in groups] == ["heliostat"]
    for rule in groups[0]["IpPermissions"]:
        for source in rule["IpRanges"]:
            assert (rule["FromPort"], rule["ToPort"]) in ((22, 22), (8000, 8000))
            assert rule["FromPort"] == 22 or source["CidrIp"].startswith("10.")
        assert rule["IpRanges"] or rule["UserIdGroupPairs"][0]["GroupId"] == groups[0]["GroupId"]


@pytest.fixture(params=KUBERAY, ids=lambda path: path.name)
def kuberay(request: pytest.FixtureRequest) -> list[Any]:
    return [manifests.read(part) for part in yaml.safe_load_all(text(request.param))]


def test_kuberay_knows_every_field(kuberay: list[Any]) -> None:
    ours, policy = kuberay
    cluster = ours.cluster
    assert cluster.authOptions.mode == "token"
    assert cluster.rayVersion == metadata.version("ray")
    assert cluster.headGroupSpec.rayStartParams == {"num-cpus": "0", "num-gpus": "0"}
    pods = [cluster.headGroupSpec.template, *(g.template for g in cluster.workerGroupSpecs)]
    containers = [container for pod in pods for container in pod.spec.containers]
    # KubeRay takes CPUs and GPUs from the limits, which must not be less than what is asked for.
    assert all(c.resources.requests == c.resources.limits for c in containers)
    assert len({container.image for container in containers}) == 1
    assert all({"role", "market"} == group.labels.keys() for group in cluster.workerGroupSpecs)
    assert all(group.minReplicas == 0 < group.maxReplicas for group in cluster.workerGroupSpecs)
    open_to_others = [
        port.port for rule in policy.spec.ingress for port in rule.ports if rule.ports
    ]
    assert set(open_to_others) <= {8265, 8000, 8080} and policy.spec.policyTypes == ["Ingress"]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec", "rayClusterspec"), {}),
        (("spec", "authOptions"), {"mode": "disabled"}),
        (("spec", "headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "0"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePull"), "x"),
    ],
)
def test_a_mistake_would_be_found(path: tuple[Any, ...], wrong: Any) -> None:
    part = next(iter(yaml.safe_load_all(text(FOLDER / "kuberay/raycluster.yaml"))))
    node = part
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = wrong
    with pytest.raises(pydantic.ValidationError):
        manifests.read(part)


def test_the_job_is_one_that_we_run() -> None:
    job = manifests.read(next(iter(yaml.safe_load_all(text(FOLDER / "kuberay/rayjob.yaml")))))
    assert isinstance(job, manifests.RayJob)
    python, dash, module, verb, recipe, *rest = shlex.split(job.spec.entrypoint)
    assert (python, dash, module, verb) == ("python", "-m", "cluster.cli", "up")
    loading.load(recipe, [word for word in rest if "=" in word])


def test_the_service_is_what_serve_writes() -> None:
    from ray.serve.schema import ServeDeploySchema

    part = next(iter(yaml.safe_load_all(text(FOLDER / "kuberay/rayservice.yaml"))))
    service = manifests.read(part)
    assert isinstance(service, manifests.RayService)
    config = yaml.safe_load(service.spec.serveConfigV2)
    ServeDeploySchema.model_validate(config)
    (app,) = config["applications"]
    assert (app["import_path"], app["name"]) == (deploy.IMPORT_PATH, deploy.APPLICATION)
    ours = deploy.application(
        ServeSection(host="0.0.0.0", replicas=(1, 8)),
        app["args"]["store"],
        [],
        deploy.Shape(1, 2),
        runtime_env={},
    )
    assert app["args"].keys() == ours["args"].keys()
    names = [deployment["name"] for deployment in app["deployments"]]
    assert names == [*(d["name"] for d in ours["deployments"]), "gpt-demo"]
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8000}
