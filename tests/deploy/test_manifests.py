"""deploy/gke_jobset.yaml against Kubernetes' schemas, and against the fields of a JobSet."""

from pathlib import Path

import pytest
import yaml
from our_commands import parsed

from sso_jax.runtime.signals import EXIT_STATUS

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT, JOBSET = yaml.safe_load_all((ROOT / "deploy" / "gke_jobset.yaml").read_text())
ACTIONS = [
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
]
REASONS = [
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
]


def table(required, **properties):
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT, RULE_NAMES = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
FIELDS_USED = table(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=table(["name"], name={"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, annotations={"type": "object"}),
    spec=table(
        ["replicatedJobs"],
        failurePolicy=table(
            [],
            maxRestarts={"type": "integer", "minimum": 0},
            rules={
                "type": "array",
                "items": table(
                    ["action"],
                    name=TEXT,
                    action={"enum": ACTIONS},
                    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
                    targetReplicatedJobs=RULE_NAMES,
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": table(
                ["name", "template"],
                name=TEXT,
                replicas={"type": "integer", "minimum": 0},
                template=table(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
            ),
        },
    ),
)
"""The part of a JobSet (v1alpha2, from 0.6 on) that the file uses; the rest of it is a Job."""


def job() -> dict:
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}


def container() -> dict:
    (only,) = job()["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("version", ["1.31", "newest"])
def test_kubernetes_takes_the_account_and_the_job(version):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    release = validator.latest_version() if version == "newest" else version
    for manifest in (ACCOUNT, job()):
        validator.validate(manifest, release, strict=True)
    wrong = {**job(), "spec": {**job()["spec"], "paralelism": 4}}
    with pytest.raises(validator.ValidationError, match="paralelism"):
        validator.validate(wrong, release, strict=True)


def test_the_jobset_has_fields_of_its_kind():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(JOBSET, FIELDS_USED)


def test_the_pods_fill_the_slice():
    pods, chips = job()["spec"]["parallelism"], container()["resources"]["limits"]["google.com/tpu"]
    selected = job()["spec"]["template"]["spec"]["nodeSelector"]
    rows, columns = map(int, selected["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job()["spec"]["completions"] == pods and pods * chips == rows * columns


def test_a_stop_restarts_all_pods_without_a_limit():
    """A stopped pod fails its Job by the pod failure policy, and that reason restarts the JobSet uncounted."""
    exits, evicted = job()["spec"]["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"]["values"] == [EXIT_STATUS] and exits["onExitCodes"]["operator"] == "In"
    assert exits["onExitCodes"]["containerName"] == container()["name"]
    assert exits["action"] == evicted["action"] == "FailJob"
    (rule,) = JOBSET["spec"]["failurePolicy"]["rules"]
    assert rule["action"].endswith("AndIgnoreMaxRestarts") and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job()["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # what a pod failure policy needs


def test_the_command_is_ours_and_writes_to_the_bucket(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parsed(container()["command"])
    assert config.hosts.initialize and config.run.directory.startswith("gs://")
    assert job()["spec"]["template"]["spec"]["serviceAccountName"] == ACCOUNT["metadata"]["name"]
