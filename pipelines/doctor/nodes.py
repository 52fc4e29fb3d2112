"""Nodes that fit, whether they are there or Karpenter makes them, and the Neuron driver on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from modelmill.components.launchers.trainjob_config import Toleration
from modelmill.pipelines.doctor import neuron, registry
from modelmill.pipelines.doctor.cluster import KARPENTER, Target
from modelmill.pipelines.doctor.finding import Finding, Level
from modelmill.pipelines.doctor.kube import Json, Refused, quantity
from modelmill.pipelines.doctor.places import EFA, Amounts, Place, places, shown

_PLUGINS = {
    EFA: "kubectl -n kube-system get daemonset aws-efa-k8s-device-plugin",
    "nvidia.com/gpu": "kubectl get daemonset -A -l app.kubernetes.io/name=nvidia-device-plugin",
    "aws.amazon.com/neuron": "kubectl get daemonset -A -l name=neuron-device-plugin-ds",
}
_JUDGED: dict[neuron.Verdict, tuple[Level, str]] = {
    "works": ("ok", ""),
    "fails": ("fail", "choose an AMI with another driver in the EC2NodeClass, or an image of another SDK"),
    "unknown": ("warn", "compare with the release notes of the image's Neuron SDK and of the driver"),
}
_INSTANCE_TYPE = "node.kubernetes.io/instance-type"
_WELL_KNOWN = ("kubernetes.io/", "k8s.io/", "karpenter.k8s.aws/", "karpenter.sh/capacity-type")  # any value may come


def nodes(target: Target) -> Iterator[Finding]:
    """Nodes that are there, or that Karpenter would make."""
    there = target.kube.get("/api/v1/nodes")["items"]
    pools: list[Json] = []
    if KARPENTER[1] in target.kube.served(KARPENTER[0]):
        try:
            pools = target.kube.get(f"/apis/{KARPENTER[0]}/{KARPENTER[1]}/nodepools")["items"]
        except Refused as error:
            yield Finding("warn", "nodes", f"you may not look at Karpenter's NodePools: {error}")
    for place in places(target):
        yield _nodes_of(place, there, pools)


def _nodes_of(place: Place, there: Sequence[Json], pools: Sequence[Json]) -> Finding:
    candidates = [node for node in there if _admits(node, place)]
    fitting = [node for node in candidates if not _lacks(node, place)]
    if len(fitting) >= place.count:
        return Finding("ok", "nodes", f"{place.name}: {len(fitting)} node(s) hold {shown(place.each)}")
    refusals = {pool["metadata"]["name"]: _pool_refuses(pool, place) for pool in pools}
    willing = [name for name, reason in refusals.items() if not reason]
    if willing:
        text = f"{place.name}: {len(fitting)} of {place.count} node(s) there; Karpenter makes them from {willing[0]}"
        return Finding("ok", "nodes", text)
    selector = ",".join(f"{key}={value}" for key, value in place.node_selector.items())
    fix = f"kubectl get nodes -l '{selector}'" if selector else "kubectl get nodes"
    if candidates and not fitting:
        lacking = _lacks(candidates[0], place)
        resource = next(iter(lacking))
        text = f"{place.name}: nodes are there but hold less than {shown(place.each)}: {shown(lacking)}"
        return Finding("fail", "nodes", text, _PLUGINS.get(resource, fix))
    text = f"{place.name}: {len(fitting)} of {place.count} node(s) with {selector or 'room'}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    text += f", and no NodePool of Karpenter makes them ({reasons})" if pools else ", and nothing makes them"
    return Finding("fail", "nodes", text, fix)


def _admits(node: Json, place: Place) -> bool:
    labels, spec = node["metadata"].get("labels", {}), node.get("spec", {})
    if spec.get("unschedulable") or any(labels.get(key) != value for key, value in place.node_selector.items()):
        return False
    ready = [each for each in node.get("status", {}).get("conditions", []) if each["type"] == "Ready"]
    return all(each["status"] == "True" for each in ready) and not _untolerated(spec.get("taints", []), place)


def _untolerated(taints: Sequence[Json], place: Place) -> list[str]:
    """Taints that keep the pods away."""
    return [
        taint["key"]
        for taint in taints
        if taint["effect"] in ("NoSchedule", "NoExecute")
        and not any(_tolerates(each, taint) for each in place.tolerations)
    ]


def _tolerates(toleration: Toleration, taint: Json) -> bool:
    return (
        toleration.key == taint["key"]
        and toleration.effect in (None, taint["effect"])
        and (toleration.operator == "Exists" or toleration.value == taint.get("value", ""))
    )


def _lacks(node: Json, place: Place) -> Amounts:
    """What a node can never give to one pod, with what it has of it; a resource nobody offers comes first."""
    allocatable = node.get("status", {}).get("allocatable", {})
    has = {resource: quantity(allocatable.get(resource, 0)) for resource in place.each}
    lacking = {resource: amount for resource, amount in has.items() if amount < place.each[resource]}
    return dict(sorted(lacking.items(), key=lambda entry: entry[1]))


def _pool_refuses(pool: Json, place: Place) -> str:
    """Why Karpenter makes no node of this pool for these pods, or nothing."""
    template = pool["spec"]["template"]
    for condition in pool.get("status", {}).get("conditions", []):
        if condition["type"] == "Ready" and condition["status"] == "False":
            return f"not ready, {condition.get('message') or condition.get('reason')}"
    if taints := _untolerated(template["spec"].get("taints", []), place):
        return f"taint {taints[0]} is not tolerated"
    labels = {**template.get("metadata", {}).get("labels", {}), "karpenter.sh/nodepool": pool["metadata"]["name"]}
    rules: dict[str, list[Json]] = {}
    for rule in template["spec"].get("requirements", []):
        rules.setdefault(rule["key"], []).append(rule)
    for key, value in place.node_selector.items():
        if key in labels:
            if labels[key] != value:
                return f"{key} is {labels[key]}"
        elif key in rules:
            if refused := [rule for rule in rules[key] if not _rule_admits(rule, value)]:
                return f"{key} {refused[0]['operator']} {', '.join(refused[0].get('values', []))}"
        elif not any(known in key for known in _WELL_KNOWN):
            return f"no label {key}"
    limits = pool["spec"].get("limits", {})
    for resource, amount in place.total.items():
        if resource in limits and quantity(limits[resource]) < amount:
            return f"limit of {resource} {limits[resource]}"
    return ""


def _rule_admits(rule: Json, value: str) -> bool:
    values, operator = rule.get("values", []), rule["operator"]
    if operator in ("In", "NotIn"):
        return (value in values) == (operator == "In")
    if operator in ("Gt", "Lt"):
        number, bound = int(value), int(values[0])
        return number > bound if operator == "Gt" else number < bound
    return operator == "Exists"


def neuron_driver(target: Target) -> Iterator[Finding]:
    """The driver of Trainium nodes against the SDK of the image, as far as either can be seen from here."""
    for place in places(target):
        if not any("neuron" in resource for resource in place.each):
            continue
        here = [node for node in target.kube.get("/api/v1/nodes")["items"] if _admits(node, place)]
        look = "kubectl debug node/{} -it --image=busybox -- cat /host/sys/module/neuron/version"
        if not here:
            text = f"{place.name}: no node is up, so its driver cannot be seen; the AMI of the node class decides it"
            yield Finding(
                "warn", "neuron driver", text, "kubectl get ec2nodeclass -o yaml | grep -A3 amiSelectorTerms"
            )
            continue
        sdk = _sdk(target)
        for node in here:
            name, driver = node["metadata"]["name"], _driver(node)
            if driver is None:
                text = f"node {name} names no driver version in its labels or annotations"
                yield Finding("warn", "neuron driver", text, look.format(name))
                continue
            verdict, why = neuron.judge(driver, sdk, trainium2=_instance_type(node, place).startswith("trn2"))
            level, fix = _JUDGED[verdict]
            yield Finding(level, "neuron driver", f"node {name} has driver {driver}: {why}", fix)
        return  # steps and training jobs share the nodes


def _sdk(target: Target) -> str:
    """`2.30`: the SDK that the image's reference names, or the label that says what it was built from; else empty."""
    job = target.profile.trainjob
    reference = job.image if job and job.image else target.profile.images.reference("neuron")
    base = registry.labels(reference).get("org.opencontainers.image.base.name", "") if reference else ""
    match = re.search(r"sdk(\d+\.\d+)", f"{reference} {base}")
    return match.group(1) if match else ""


def _instance_type(node: Json, place: Place) -> str:
    return str({**place.node_selector, **node["metadata"].get("labels", {})}.get(_INSTANCE_TYPE, ""))


def _driver(node: Json) -> str | None:
    named = {**node["metadata"].get("labels", {}), **node["metadata"].get("annotations", {})}
    for key, value in sorted(named.items()):
        if "neuron" in key and "driver" in key and re.match(r"\d+(\.\d+)+", value):
            return value
    return None
