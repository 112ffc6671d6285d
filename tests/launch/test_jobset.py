"""The JobSet manifest, as it lies there and as launch/gke.sh fills it in.

The part that is a Job is checked, strictly, by Kubernetes' own schema; the JobSet around it by the
fields of its public definition (jobset.x-k8s.io/v1alpha2) that we use, written down here.
"""

import re

import jsonschema
import kubernetes_validate
import pytest
import yaml
from micro_run import ROOT

NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 50}
COUNT = {"type": "integer", "minimum": 0}


def record(required, **others):
    """A mapping with these keys and no others."""
    return {"type": "object", "properties": {**required, **others}, "required": list(required),
            "additionalProperties": False}  # fmt: skip


def items(schema):
    return {"type": "array", "minItems": 1, "items": schema}


RULE = record(
    {"name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
     "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]}},
    onJobFailureReasons=items({"enum": [
        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    ]}),
    onJobFailureMessagePatterns=items({"type": "string", "format": "regex"}),
    targetReplicatedJobs=items(NAME),
)  # fmt: skip
JOBSET = record({
    "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
    "kind": {"const": "JobSet"},
    "metadata": record(
        {"name": NAME},
        annotations={"type": "object", "additionalProperties": {"type": "string"}},
    ),
    "spec": record(
        {"replicatedJobs": items(record({"name": NAME, "replicas": COUNT, "template": {}}))},
        failurePolicy=record({"maxRestarts": COUNT}, rules=items(RULE)),
    ),
})  # fmt: skip


def check(manifest):
    """Raises what the schemas find; returns the spec of the slices' job and of its pods."""
    jsonschema.validate(manifest, JOBSET)
    (job,) = manifest["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
    kubernetes_validate.validate(whole | job["template"], "1.32", strict=True)
    return job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def action(manifest, code, condition=None):
    """What becomes of the JobSet when a pod leaves with `code`, and Kubernetes has such a reason.

    The message is that of Kubernetes' pkg/controller/job/pod_failure_policy.go; the first rule that
    fits is taken, there and in JobSet; what none fits is restarted, and counts.
    """
    job, _ = check(manifest)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes = rule.get("onExitCodes", {"values": []})["values"]
        if code in codes or {"type": condition, "status": "True"} in rule.get(
            "onPodConditions", []
        ):
            what = f"failed with exit code {code}" if codes else f"has condition {condition}"
            reason = "PodFailurePolicy"
            message = f"Pod default/run {what} matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.fixture
def manifest():
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def test_the_manifest_is_one_as_it_lies_there(manifest):
    check(manifest)


@pytest.mark.parametrize(
    ("code", "condition", "expected"),
    [
        (2, None, "FailJobSet"),
        (130, None, "FailJobSet"),
        (75, None, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (75, "DisruptionTarget", "RestartJobSetAndIgnoreMaxRestarts"),
        (1, None, "RestartJobSet"),
        (124, None, "RestartJobSet"),
        (137, None, "RestartJobSet"),
    ],
)
def test_what_a_pod_that_ends_does_to_all(manifest, code, condition, expected):
    assert action(manifest, code, condition) == expected


def test_pods_have_time_to_save(manifest):
    _, pod = check(manifest)
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_the_schemas_see_what_is_wrong(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["podFailurePolicy"]["rules"][0]["onExitCodes"]["value"] = [2]
    with pytest.raises(kubernetes_validate.ValidationError):
        check(manifest)
    manifest["spec"]["failurePolicy"]["rules"][0]["onJobFailureReason"] = []
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_the_launcher_fills_it_in(fakes):
    words = ["train", "--config=configs/tiny.py:smoke", "--workdir=/shared/a, b", '--config.x="\\']
    result = fakes.launch(
        "gke", "--image=registry/ouro:1", "--claim=filestore", "--type=tpu-v6e-slice", "--slices=2",
        "--topology=16x16", "--attempts=7", "--name=Sweep_1", "--", *words,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert fakes.calls("kubectl") == ["apply --filename=-"]
    filled = yaml.safe_load((fakes.folder / "kubectl.stdin").read_text())
    job, pod = check(filled)
    assert filled["metadata"]["name"] == "sweep-1"
    assert filled["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert filled["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (64, 64, 0)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 130]
    assert sorted(pod["nodeSelector"].values()) == ["16x16", "tpu-v6e-slice"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "filestore"
    container = pod["containers"][0]
    assert container["image"] == "registry/ouro:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    start = container["command"].index("--")
    assert container["command"][start + 1 :] == words
    assert container["command"][:2] == ["launch/local.sh", "--attempts=1"]
