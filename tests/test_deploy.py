"""cluster.yaml and deploy/: what Ray, AWS and Kubernetes would say of them, and that they are shut where they should be."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from dfssd.train.ending import LIMIT_S

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def job():
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


def _aws_errors(node_config):
    model = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, model).generate_report()


def test_ray_accepts_the_cluster(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))
    cluster["available_node_types"]["gpu"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(cluster))


def test_aws_accepts_the_nodes(cluster):
    for name, kind in cluster["available_node_types"].items():
        assert not _aws_errors(kind["node_config"]), name
    assert "InstanceTyp" in _aws_errors({"InstanceTyp": "m7i.large"})  # what Ray does not check


def test_versions_are_the_tested_ones(cluster, job):
    assert {"ray", "torch", "torchvision", "mlflow", "ultralytics"} <= set(PINS)
    installs = [c for c in cluster["setup_commands"] if "pip install" in c]
    docker = (ROOT / "deploy" / "Dockerfile").read_text()
    installs += [c for c in re.split(r"&&|\n(?=[A-Z]+ )", docker.replace("\\\n", "")) if "pip install" in c]
    assert len(installs) == 4 and all("-c constraints.txt" in c for c in installs)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]


def test_the_nodes_have_all_that_the_project_needs(cluster, tmp_path):
    """The command that writes their requirements, run as they run it."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for there, here in cluster["file_mounts"].items():
        if here.startswith("./"):
            (tmp_path / Path(there).name).write_bytes((ROOT / here).read_bytes())
    (command,) = (c for c in cluster["setup_commands"] if "requirements.txt" in c and "pip" not in c)
    command = command.replace("~/dfssd-env/bin/python", sys.executable)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == needed
    assert any("-r requirements.txt" in c and "boto3" in c for c in cluster["setup_commands"])


def test_the_cluster_is_shut(cluster):
    for command in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        assert "ray stop" in command or "RAY_AUTH_MODE=token" in command
        assert "0.0.0.0" not in command
    head = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", head)[1]) > LIMIT_S, "a stopped job stores a checkpoint"
    for rule in cluster["provider"]["security_group"]["IpPermissions"]:
        assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
        assert all(not r["CidrIp"].endswith("/0") for r in rule["IpRanges"])
    for kind in cluster["available_node_types"].values():
        own = kind["node_config"]
        assert own["MetadataOptions"]["HttpTokens"] == "required" and own["IamInstanceProfile"]
        assert all(disk["Ebs"]["Encrypted"] for disk in own["BlockDeviceMappings"])
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["CPU"] == 0 and "InstanceMarketOptions" not in head["node_config"]
    for name in ("gpu", "cpu"):
        kind = cluster["available_node_types"][name]
        assert kind["min_workers"] == 0 and kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert not re.search(r"AKIA|aws_secret|AWS_ACCESS_KEY", (ROOT / "cluster.yaml").read_text())


# The fields used, as ray.io/v1 declares them (CustomResourceDefinition rayjobs.ray.io of KubeRay 1.6); others are refused.
_CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources", "env"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "env": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        "envFrom": {"type": "array"},
        "resources": {"type": "object", "required": ["requests", "limits"]},
        "volumeMounts": {"type": "array", "items": {"type": "object", "required": ["mountPath", "name"]}},
    },
}
_POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "additionalProperties": False,
            "properties": {"containers": {"type": "array", "items": _CONTAINER}, "volumes": {"type": "array"}},
        }
    },
}
_PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
_GROUP = {
    "type": "object",
    "required": ["groupName", "rayStartParams", "template", "minReplicas", "maxReplicas"],
    "additionalProperties": False,
    "properties": {
        "groupName": {"type": "string"},
        **{k: {"type": "integer", "minimum": 0} for k in ("replicas", "minReplicas", "maxReplicas")},
        "rayStartParams": _PARAMETERS,
        "template": _POD,
    },
}
_CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec", "rayVersion", "authOptions"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "authOptions": {
            "type": "object",
            "required": ["mode"],
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["token", "disabled"]}, "secretName": {"type": "string"}},
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
            "properties": {"rayStartParams": _PARAMETERS, "template": _POD},
        },
        "workerGroupSpecs": {"type": "array", "items": _GROUP},
    },
}
_JOB = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        **{k: {"type": "integer"} for k in ("backoffLimit", "ttlSecondsAfterFinished", "activeDeadlineSeconds")},
        "rayClusterSpec": _CLUSTER,
    },
}


def test_kubernetes_accepts_the_job(job):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(job["spec"], _JOB)


def _bytes(quantity):
    """Of a Kubernetes quantity: 8Gi, 24Gi, or plain bytes."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", str(quantity)).groups()
    return int(number) * 1024 ** ("KMGT".index(unit[0]) + 1 if unit else 0)


def _pods(spec):
    """(parameters of ray start, pod) of head and workers."""
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [(group["rayStartParams"], group["template"]) for group in groups]


def test_the_job_has_a_token_shared_memory_and_no_secret_in_it(job):
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"]["mode"] == "token" and spec["authOptions"]["secretName"]
    for parameters, pod in _pods(spec):
        (container,), (volume,) = pod["spec"]["containers"], pod["spec"]["volumes"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        # Ray puts its store on disk where /dev/shm is smaller; loading processes need some of it too, and it is memory.
        store, shm = int(parameters["object-store-memory"]), _bytes(volume["emptyDir"]["sizeLimit"])
        assert 1.5 * store <= shm <= _bytes(container["resources"]["limits"]["memory"]) / 2
        env = {one["name"]: one["value"] for one in container["env"]}
        assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) > LIMIT_S
        assert env["RAY_AUTH_MODE"] == "token" and not any("SECRET" in k or "KEY" in k for k in env)
        assert "MLFLOW_TRACKING_URI" in env and container["envFrom"][0]["secretRef"]["name"]
    (gpu,) = spec["workerGroupSpecs"]
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert 0 <= gpu["minReplicas"] <= gpu["replicas"] <= gpu["maxReplicas"]


def test_nobody_else_reaches_the_pods(job):
    policy = yaml.safe_load((ROOT / "deploy" / "networkpolicy.yaml").read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy["spec"]
    chosen = spec["podSelector"]["matchLabels"]
    for _, pod in _pods(job["spec"]["rayClusterSpec"]):
        assert chosen.items() <= pod["metadata"]["labels"].items()
    assert spec["policyTypes"] == ["Ingress"]
    own, others = spec["ingress"]
    assert own["from"] == [{"podSelector": {"matchLabels": chosen}}]
    assert others["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert all(peer["podSelector"]["matchLabels"] for peer in others["from"]), "an empty selector is everybody"
    assert others["from"][0]["podSelector"]["matchLabels"] == {"job-name": job["metadata"]["name"]}


def test_what_is_built_is_neither_kept_nor_uploaded():
    for name in (".gitignore", ".rayignore"):
        assert {"/build/", "__pycache__/", ".venv/"} <= set((ROOT / name).read_text().split())


def test_the_image_copies_what_is_there():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = [w for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for w in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert "USER ray" in text and "RAY_AUTH_MODE=token" in text
