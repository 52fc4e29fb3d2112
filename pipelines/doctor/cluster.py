"""The cluster of a profile: everything that a run would find missing there, looked at before it costs anything.

Who asks is the user of the kubeconfig; what a service account may do is asked of the API server in its name. A
question that the user may not ask is a warning that names the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from modelmill.components.core.errors import UserError
from modelmill.pipelines.doctor.finding import Finding
from modelmill.pipelines.doctor.kube import Kube, Refused, Unreachable
from modelmill.pipelines.platform import Profile

TRAINER = ("trainer.kubeflow.org", "v1alpha1")
JOBSET = ("jobset.x-k8s.io", "v1alpha2")
KUEUE = ("kueue.x-k8s.io", "v1beta2", "v1beta1")  # the newest first
KARPENTER = ("karpenter.sh", "v1")
_INSTALL = "bash build/manifests/cluster/install.sh"  # pinned charts of every operator; see docs/operations.md
_APPLY = "kubectl apply --server-side -k build/manifests/overlays/eks"
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
_ENFORCE = "pod-security.kubernetes.io/enforce"
_ROLE = "eks.amazonaws.com/role-arn"
# What a user does through the command, and what the launcher does in a step's pod.
_OF_USER = (("list", "pods"), ("get", "pods/log"), ("list", "events"))
_OF_USER_WITH_JOBS = (("get", "trainjobs"), ("list", "trainjobs"), ("delete", "trainjobs"))
_OF_LAUNCHER = (
    *((verb, "trainjobs") for verb in ("create", "get", "list", "watch", "patch", "delete")),
    *(("list", "pods"), ("get", "pods/log"), ("list", "events")),
)
_OF_KFP = (("create", "runs"), ("get", "runs"), ("list", "runs"), ("terminate", "runs"))


@dataclass(frozen=True)
class Target:
    """What is looked at: a cluster, a profile, and the nodes of a training job of the recipe (1 without a recipe)."""

    kube: Kube
    profile: Profile
    nodes: int = 1


Check = Callable[[Target], Iterator[Finding]]


def ask(checks: Sequence[Check], target: Target) -> list[Finding]:
    """Run checks; an API server that is silent or refuses the credentials ends them with one finding."""
    findings: list[Finding] = []
    for check in checks:
        subject = check.__name__.strip("_").replace("_", " ")
        try:
            for finding in check(target):
                findings.append(finding)
        except Unreachable as error:
            fix = "`kubectl cluster-info`, then name the right context or cluster in KUBECONFIG"
            return [*findings, Finding("fail", "kubernetes", str(error), fix)]
        except Refused as error:
            if error.status == 401:
                fix = "log in again, on EKS `aws eks update-kubeconfig --name CLUSTER`"
                return [*findings, Finding("fail", "kubernetes", f"your credentials are refused: {error}", fix)]
            if error.status == 403:
                fix = "ask the platform team to look, or for the permission"
                findings.append(Finding("warn", subject, f"you may not look: {error}", fix))
            else:
                findings.append(Finding("fail", subject, f"the API server answers {error.status}: {error}"))
        except Exception as error:
            text = f"the check itself failed: {type(error).__name__}: {error}"
            findings.append(Finding("fail", subject, text))
    return findings


def access(target: Target) -> Iterator[Finding]:
    version = target.kube.get("/version")
    target.kube.served("")  # a version is told to anybody; this needs credentials that count
    yield Finding("ok", "kubernetes", f"{version['gitVersion']} at {target.kube.client.configuration.host}")


def served(target: Target) -> Iterator[Finding]:
    profile, job = target.profile, target.profile.trainjob if target.profile.launcher == "trainjob" else None
    wanted: list[tuple[str, ...]] = [TRAINER, JOBSET] if job else []
    wanted += [KUEUE] if job and job.queue else []
    places = [profile.step, profile.device_step, job]
    if any(key.startswith("karpenter.sh/") for place in places if place for key in place.node_selector):
        wanted.append(KARPENTER)
    for group, *versions in wanted:
        found = target.kube.served(group)
        usable = [version for version in versions if version in found]
        if usable:
            yield Finding("ok", "apis", f"{group} serves {usable[0]}")
        elif found:
            text = f"{group} serves {', '.join(found)}, not {versions[0]}"
            yield Finding("fail", "apis", text, _INSTALL)
        else:
            yield Finding("fail", "apis", f"{group} is not installed", _INSTALL)


def namespace(target: Target) -> Iterator[Finding]:
    name = target.profile.namespace
    found = target.kube.find(f"/api/v1/namespaces/{name}")
    if found is None:
        yield Finding("fail", "namespace", f"{name} does not exist", _APPLY)
        return
    level = found["metadata"].get("labels", {}).get(_ENFORCE)
    if level == "restricted":
        yield Finding("ok", "namespace", f"{name} enforces Pod Security {level}")
    else:
        text = f"{name} enforces Pod Security {level or 'nothing'}; pods of a run keep to restricted"
        yield Finding("warn", "namespace", text, f"kubectl label --overwrite namespace {name} {_ENFORCE}=restricted")


def accounts(target: Target) -> Iterator[Finding]:
    profile = target.profile
    names = {profile.service_account: profile.namespace}
    if profile.launcher == "trainjob" and profile.trainjob:
        names[profile.trainjob.service_account] = profile.trainjob.namespace
    for name, space in names.items():
        found = target.kube.find(f"/api/v1/namespaces/{space}/serviceaccounts/{name}")
        if found is None:
            fix = f"kubectl -n {space} create serviceaccount {name}"
            yield Finding("fail", "account", f"service account {space}/{name} does not exist", fix)
            continue
        role = found["metadata"].get("annotations", {}).get(_ROLE)
        text = f"{space}/{name}, " + (f"role {role}" if role else "no IAM role annotated (Pod Identity shows none)")
        yield Finding("ok", "account", text)


def secrets(target: Target) -> Iterator[Finding]:
    """By name only: contents are never asked for."""
    profile = target.profile
    wanted = {profile.tracking.secret: "login of MLflow"} if profile.tracking.secret else {}
    wanted |= {reference.partition("/")[0]: variable for variable, reference in profile.secrets.items()}
    if profile.launcher == "trainjob" and profile.trainjob:
        wanted |= {reference.partition("/")[0]: variable for variable, reference in profile.trainjob.secrets.items()}
    for name, purpose in wanted.items():
        if target.kube.names_it(f"/api/v1/namespaces/{profile.namespace}/secrets/{name}"):
            yield Finding("ok", "secret", f"{name} exists ({purpose}); its content was not read")
        else:
            fix = f"kubectl -n {profile.namespace} create secret generic {name} --from-literal=KEY=VALUE"
            yield Finding("fail", "secret", f"{name} does not exist ({purpose})", fix)


def volumes(target: Target) -> Iterator[Finding]:
    profile = target.profile
    for volume in filter(None, [profile.home, *profile.volumes]):
        found = target.kube.find(f"/api/v1/namespaces/{profile.namespace}/persistentvolumeclaims/{volume.claim}")
        show = f"kubectl -n {profile.namespace} describe pvc {volume.claim}"
        if found is None:
            yield Finding(
                "fail",
                "volume",
                f"claim {volume.claim} does not exist",
                _APPLY,
            )
            continue
        phase = found.get("status", {}).get("phase", "Pending")
        modes = found.get("status", {}).get("accessModes") or found["spec"].get("accessModes", [])
        enough = {"ReadWriteMany"} | ({"ReadOnlyMany"} if volume.read_only else set())
        if phase != "Bound":
            yield Finding("fail", "volume", f"claim {volume.claim} is {phase}, not Bound", show)
        elif not enough & set(modes):
            text = (
                f"claim {volume.claim} has {', '.join(modes)}; the pods of a run share it, which needs ReadWriteMany"
            )
            yield Finding("fail", "volume", text, "make the claim anew on a shared file system such as FSx for Lustre")
        else:
            size = found.get("status", {}).get("capacity", {}).get("storage", "?")
            yield Finding("ok", "volume", f"claim {volume.claim} is bound, {', '.join(modes)}, {size}")


def runtime(target: Target) -> Iterator[Finding]:
    job = target.profile.trainjob
    if target.profile.launcher != "trainjob" or job is None or not target.kube.served(TRAINER[0]):
        return
    base = "/apis/{}/{}/clustertrainingruntimes".format(*TRAINER)
    found = target.kube.find(f"{base}/{job.runtime}")
    if found is None:
        names = [each["metadata"]["name"] for each in target.kube.get(base)["items"]]
        text = f"no ClusterTrainingRuntime {job.runtime}; there are {', '.join(sorted(names)) or 'none'}"
        yield Finding("fail", "runtime", text, f"{_APPLY}, or set trainjob.runtime")
        return
    jobs = found["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", [])
    labels = [each.get("template", {}).get("metadata", {}).get("labels", {}).get(_ANCESTOR) for each in jobs]
    if "trainer" not in labels:
        text = f"{job.runtime} has no replicated job labelled {_ANCESTOR}=trainer, so Trainer starts no process in it"
        yield Finding("fail", "runtime", text, f"kubectl edit clustertrainingruntime {job.runtime}")
    elif "torch" not in found["spec"].get("mlPolicy", {}):
        text = f"{job.runtime} has no mlPolicy.torch, so torchrun gets no addresses"
        yield Finding("fail", "runtime", text, f"kubectl edit clustertrainingruntime {job.runtime}")
    else:
        yield Finding("ok", "runtime", f"ClusterTrainingRuntime {job.runtime}")


def permissions(target: Target) -> Iterator[Finding]:
    profile, jobs = target.profile, target.profile.launcher == "trainjob"
    yield from _allowed(target, [*_OF_USER, *(_OF_USER_WITH_JOBS if jobs else ())], None, "logs and cancel")
    if profile.kfp.auth != "none":
        lacking = [verb for verb, name in _OF_KFP if not _may(target, verb, name, None)]
        text = f"you may not {', '.join(lacking)} runs of KFP, as far as Kubernetes decides (multi-user mode)"
        if lacking:
            yield Finding("warn", "permissions", text, _binding("kubeflow-pipelines-edit", profile.namespace))
    if jobs:
        try:
            yield from _allowed(target, list(_OF_LAUNCHER), profile.service_account, "launching")
        except Refused as error:
            if error.status != 403:
                raise
            account = f"system:serviceaccount:{profile.namespace}:{profile.service_account}"
            fix = f"kubectl auth can-i create {_full('trainjobs')} -n {profile.namespace} --as {account}"
            yield Finding("warn", "permissions", f"you may not ask for {profile.service_account}: {error}", fix)


def _allowed(
    target: Target, wanted: Sequence[tuple[str, str]], account: str | None, purpose: str
) -> Iterator[Finding]:
    who = f"service account {account}" if account else "you"
    lacking = [f"{verb} {name}" for verb, name in wanted if not _may(target, verb, name, account)]
    space = target.profile.namespace
    if lacking:
        text = f"{who} may not {', '.join(lacking)} in {space}, which {purpose} needs"
        yield Finding(
            "fail", "permissions", text, _binding("trainjob-launcher" if account else "view", space, account)
        )
    else:
        yield Finding("ok", "permissions", f"{who} may do what {purpose} needs in {space}")


def _may(target: Target, verb: str, name: str, account: str | None) -> bool:
    return target.kube.may(verb, _full(name), target.profile.namespace, account)


def _full(name: str) -> str:
    groups = {"trainjobs": TRAINER[0], "runs": "pipelines.kubeflow.org"}
    return f"{name}.{groups[name]}" if name in groups else name


def _binding(role: str, space: str, account: str | None = None) -> str:
    subject = f"--serviceaccount {space}:{account}" if account else "--user YOU"
    kind = "role" if account else "clusterrole"
    return f"kubectl -n {space} create rolebinding {role} --{kind} {role} {subject}"


def examine(profile: Profile, nodes: int = 1, *, in_cluster: bool = False) -> list[Finding]:
    """Look at the cluster of a profile and at the services that a run on it uses.

    Args:
        profile: of the run.
        nodes: nodes of its training job.
        in_cluster: also start a short-lived Job there that looks as the pods of a run.

    Raises:
        UserError: the Kubernetes client is not installed.
    """
    from modelmill.pipelines.doctor import inside, queues, services
    from modelmill.pipelines.doctor import nodes as machines

    findings = list(_profile(profile))
    checks: tuple[Check, ...] = (access, served, namespace, accounts, secrets, volumes, runtime, permissions)
    checks += (queues.queue, queues.namespace_quota, machines.nodes, machines.neuron_driver)
    try:
        kube = Kube.connect()
        findings += ask(checks, Target(kube, profile, nodes))
        if in_cluster:
            findings += inside.examine(profile, kube)
    except Unreachable as error:
        fix = "aws eks update-kubeconfig --name CLUSTER, or name a file in KUBECONFIG"
        findings.append(Finding("fail", "kubernetes", str(error), fix))
    return findings + services.examine(profile)


def _profile(profile: Profile) -> Iterator[Finding]:
    try:
        profile.check_submittable()
    except UserError as error:
        yield Finding("fail", "profile", str(error))
    else:
        yield Finding("ok", "profile", f"{profile.name}: {profile.description or profile.where}")
