"""What can be checked of scripts, manifests and the image without a cluster.

Pods are validated against Kubernetes' own schemas (``kubernetes-validate`` ships them). The schema
of KubeRay's fields is written out here for those that 1.6 has and we could mean; both manifests
were also validated against the operator's CRDs, as of August 2026, when they were written.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "launch").rglob("*.sbatch")) + sorted((ROOT / "scripts").rglob("*.sh"))
KINDS = {"rayjob": "RayJob", "rayservice": "RayService"}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, FLAG, ANYTHING = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
TEMPLATE = fields(("spec",), metadata=ANYTHING, spec=ANYTHING)
CLUSTER = fields(
    ("headGroupSpec", "rayVersion", "authOptions"),
    rayVersion=TEXT,
    authOptions=fields(("mode",), mode={"const": "token"}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
    ),
    headGroupSpec=fields(("template",), rayStartParams=TEXTS, template=TEMPLATE),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=TEXTS,
            template=TEMPLATE,
        ),
    },
)
SPECS = {
    # A job that leaves its cluster behind costs money: shutting down and a limit are required.
    "RayJob": fields(
        ("entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"),
        entrypoint=TEXT,
        shutdownAfterJobFinishes={"const": True},
        ttlSecondsAfterFinished=COUNT,
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
        runtimeEnvYAML=TEXT,
        rayClusterSpec=CLUSTER,
    ),
    "RayService": fields(
        ("serveConfigV2", "rayClusterConfig"),
        serveConfigV2=TEXT,
        rayClusterConfig=CLUSTER,
        rayClusterDeletionDelaySeconds=COUNT,
        upgradeStrategy=fields(type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}),
    ),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "kuberay" / f"{name}.yaml").read_text(encoding="utf-8"))


def check(manifest: dict[str, Any]) -> None:
    """Raises: what is wrong with it."""
    kind = manifest["kind"]
    whole = fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=fields(("name",), name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=SPECS[kind],
    )
    jsonschema.validate(manifest, whole)
    for pod in pods(manifest):
        whole_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole_pod, kubernetes_validate.latest_version(), strict=True)
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}
        assert pod["securityContext"]["runAsNonRoot"]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", KINDS)
def test_manifests(name: str) -> None:
    manifest = read(name)
    assert manifest["kind"] == KINDS[name]
    check(manifest)


def test_mistakes_are_found() -> None:
    def broken(*path: Any, value: Any = "x", name: str = "rayjob") -> dict[str, Any]:
        manifest = copy.deepcopy(read(name))
        place: Any = manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        return manifest

    cluster = ("spec", "rayClusterSpec")
    worker = (*cluster, "workerGroupSpecs", 0)
    for manifest in (
        broken("spec", "shutdownAfterJobFinishes", value=False),
        broken("spec", "entryPoint"),
        broken(*cluster, "authOptions", "mode", value="disabled"),
        broken(*worker, "maxReplicas", value="2"),
        broken(*worker, "template", "spec", "containers", 0, "imagePullPolicy", value=["Always"]),
        broken(*worker, "template", "spec", "container", value=[]),
        broken("spec", "serveConfig", name="rayservice"),
    ):
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(manifest)


def test_the_job_runs_what_is_in_the_image() -> None:
    words = read("rayjob")["spec"]["entrypoint"].split()
    program = Path(words[words.index("python") + 1])
    assert (ROOT / program.relative_to("/opt/ssd")).is_file()
    assert "WORKDIR /opt/ssd" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay/rayservice.yaml"])
def test_serve_configurations(name: str) -> None:
    pytest.importorskip("ray.serve")
    from ray.serve.schema import ServeDeploySchema

    from ssd.cluster import serve_app
    from ssd.config.load import load_config

    given = yaml.safe_load((ROOT / "launch" / name).read_text(encoding="utf-8"))
    given = yaml.safe_load(given["spec"]["serveConfigV2"]) if "spec" in given else given
    [application] = ServeDeploySchema.model_validate(given).applications
    assert application.import_path == f"{serve_app.__name__}:{serve_app.app.__name__}"
    args = serve_app.ServeArgs.model_validate(application.args)
    config = load_config("embedded" if str(args.config).startswith("/data") else args.config, args.overrides)
    assert given["http_options"]["host"] == config.server.host


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    checked = subprocess.run([tool("shellcheck"), path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_slurm_jobs_run_what_is_here(tmp_path: Path) -> None:
    """Run as Slurm would on one node, with stand-ins for its commands that say what they were given."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'alpha\\nbeta\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 "$@"\n')
    for name in ("ray", "torchrun"):
        (tmp_path / name).write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    for stand_in in tmp_path.iterdir():
        stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "alpha,beta"}
    environment |= {"SLURM_JOB_ID": "12345", "SLURM_SUBMIT_DIR": str(ROOT), "REPLICAS": "3"}

    def given(script: str, *arguments: str) -> list[str]:
        command = ["bash", str(ROOT / "launch" / "slurm" / script), *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return ran.stdout.splitlines()

    ray = given("ray_batch.sbatch", "a file.jsonl", "out.jsonl")
    assert ray[:5] == ["symmetric-run", "--address", "alpha:22345", "--min-nodes", "2"]
    assert ray[-6:] == ["launch/ray_job.py", "--replicas", "3", "batch", "a file.jsonl", "out.jsonl"]
    torchrun = given("torchrun.sbatch", "generate", "two words")
    assert torchrun[torchrun.index("--node-rank") + 1] == "1"
    assert torchrun[torchrun.index("--master-addr") + 1] == "alpha"
    assert torchrun[-3:] == ["launch/torchrun.py", "generate", "two words"]


def test_ray_jobs_run_batches_of_ray_data(tmp_path: Path) -> None:
    """Up to where a cluster is needed: a file that is not there is found before."""
    code = """
import sys
from launch import ray_job
ray_job.join = lambda: None
sys.argv[1:] = ["--replicas", "2", "batch", "missing.jsonl", "out.jsonl"]
ray_job.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "missing.jsonl" in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    ("launcher", "command"),
    [*product(["torchrun", "ray_job"], ["bench", "plan", "tune", "serve"]), ("torchrun", "batch")],
)
def test_launchers_refuse_what_would_run_without_them(launcher: str, command: str) -> None:
    """These commands would start pipelines of the launching process; a batch runs in a Ray cluster only."""
    front = {"torchrun": "launch/front.py", "ray_job": "launch/ray_job.py"}[launcher]
    own = ["0", "127.0.0.1", "2"] if launcher == "torchrun" else []
    arguments = [sys.executable, str(ROOT / front), *own, "--config", "embedded", command]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    (line,) = ran.stderr.splitlines()[-1:]
    assert line.startswith("error: ") and ("ray_serve" in line or "generate, compare, certify, info" in line)


@pytest.mark.parametrize("command", [["--config", "embedded", "generate", "x"], ["compare", "--max-tokens", "4"]])
def test_launchers_make_the_pipelines(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without changing the package: the command gets what makes pipelines."""
    from launch.commands import run
    from ssd.cli.options import Makers
    from ssd.testing.twins.llm import ScriptedLLM

    made: list[ScriptedLLM] = []

    def make(config: Any) -> Any:
        made.append(ScriptedLLM(config))
        return made[-1]

    with pytest.raises(SystemExit) as ended:
        run(command, program="launcher", commands=("generate", "compare"), makers=Makers(llm=make))
    assert ended.value.code in (0, None)
    assert len(made) == 1 and made[0].closed


def test_dockerfile() -> None:
    checked = subprocess.run([tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and not checked.stdout, checked.stdout
    copied = [
        source
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ")
        for source in line.split()[1:-1]
    ]
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [rule[1:].rstrip("/") for rule in rules if rule.startswith("!")]
    assert "*" in rules and sorted(copied) == sorted(kept)
    assert all((ROOT / source).exists() for source in copied)


def test_a_job_leaves_the_environment_at_home() -> None:
    given = yaml.safe_load((ROOT / "launch" / "runtime_env.yaml").read_text(encoding="utf-8"))
    assert not given.keys() & {"pip", "conda", "uv"}
    assert all(any(fnmatch.fnmatch(name, rule) for rule in given["excludes"]) for name in (".git/", ".venv/", "build/"))
    assert not any(fnmatch.fnmatch("ssd/data/embedded/target/model.safetensors", rule) for rule in given["excludes"])


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found
