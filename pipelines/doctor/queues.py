"""Room in the queue and in the quotas of the namespace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal

from modelmill.pipelines.doctor.cluster import KUEUE, Target
from modelmill.pipelines.doctor.finding import Finding
from modelmill.pipelines.doctor.kube import Json, quantity
from modelmill.pipelines.doctor.places import Amounts, Place, places, shown, size, training_place


def queue(target: Target) -> Iterator[Finding]:
    """The LocalQueue, its ClusterQueue, and whether some flavor of it can ever hold the job."""
    place, job = training_place(target), target.profile.trainjob
    served = [version for version in KUEUE[1:] if version in target.kube.served(KUEUE[0])]
    if place is None or job is None or job.queue is None or not served:
        return
    base = f"/apis/{KUEUE[0]}/{served[0]}"
    local = target.kube.find(f"{base}/namespaces/{job.namespace}/localqueues/{job.queue}")
    if local is None:
        names = [
            each["metadata"]["name"]
            for each in target.kube.get(f"{base}/namespaces/{job.namespace}/localqueues")["items"]
        ]
        text = f"no LocalQueue {job.queue} in {job.namespace}; there are {', '.join(sorted(names)) or 'none'}"
        yield Finding("fail", "queue", text, "kubectl apply --server-side -k build/manifests/overlays/eks")
        return
    name = local["spec"]["clusterQueue"]
    cluster = target.kube.find(f"{base}/clusterqueues/{name}")
    if cluster is None:
        fix = f"kubectl -n {job.namespace} describe localqueue {job.queue}"
        yield Finding("fail", "queue", f"LocalQueue {job.queue} belongs to {name}, which does not exist", fix)
        return
    for kind, found in (("LocalQueue", local), ("ClusterQueue", cluster)):
        if inactive := _inactive(found):
            fix = f"kubectl describe {kind.lower()} {found['metadata']['name']}"
            yield Finding("fail", "queue", f"{kind} {found['metadata']['name']} is not active: {inactive}", fix)
            return
    if other := _other_team(target, cluster):
        fix = f"kubectl label namespace {job.namespace} {other}"
        yield Finding("fail", "queue", f"ClusterQueue {name} admits namespaces with {other}, not {job.namespace}", fix)
        return
    flavors: dict[str, Json | None] = {}
    for group in cluster["spec"].get("resourceGroups", []):
        for flavor in group["flavors"]:
            flavors[flavor["name"]] = target.kube.find(f"{base}/resourceflavors/{flavor['name']}")
    yield from _quota(name, cluster, flavors, place)


def _other_team(target: Target, cluster: Json) -> str:
    """Labels that the queue wants of a namespace and this one has not."""
    wanted = (cluster["spec"].get("namespaceSelector") or {}).get("matchLabels", {})
    found = target.kube.find(f"/api/v1/namespaces/{target.profile.namespace}") or {"metadata": {}}
    has = found["metadata"].get("labels", {})
    return " ".join(f"{key}={value}" for key, value in wanted.items() if has.get(key) != value)


def _inactive(found: Json) -> str:
    """Why a queue takes no work, or nothing."""
    if found["spec"].get("stopPolicy", "None") != "None":
        return f"stopPolicy {found['spec']['stopPolicy']}"
    for condition in found.get("status", {}).get("conditions", []):
        if condition["type"] == "Active" and condition["status"] != "True":
            return condition.get("message") or condition.get("reason") or "no reason given"
    return ""


def _quota(name: str, cluster: Json, flavors: Mapping[str, Json | None], place: Place) -> Iterator[Finding]:
    groups = cluster["spec"].get("resourceGroups", [])
    covered = {resource for group in groups for resource in group["coveredResources"]}
    fix = f"kubectl edit clusterqueue {name}"
    if lacking := sorted(set(place.each) - covered):
        text = f"{name} covers no {', '.join(lacking)}, so Kueue never admits the job"
        yield Finding("fail", "quota", text, fix)
        return
    for group in groups:
        wanted = {resource: place.total[resource] for resource in group["coveredResources"] if resource in place.total}
        if not wanted:
            continue
        reasons, waits, fits = [], [], ""
        for flavor in group["flavors"]:
            reason, wait = _flavor(cluster, flavor, flavors[flavor["name"]], wanted, place)
            if reason:
                reasons.append(f"{flavor['name']}: {reason}")
            elif wait:
                waits.append(f"{flavor['name']}: {wait}")
            else:
                fits = flavor["name"]
                break
        if fits:
            yield Finding("ok", "quota", f"{name} has {shown(wanted)} free in {fits} for {place.count} node(s)")
        elif waits:
            text = f"{name} can hold the job, which would wait for others now ({'; '.join(waits)})"
            yield Finding("warn", "quota", text, f"kubectl get workloads -A; kubectl describe clusterqueue {name}")
        else:
            text = f"{name} never holds {shown(wanted)} ({'; '.join(reasons) or 'it has no flavor'})"
            yield Finding("fail", "quota", text, fix)


def _flavor(cluster: Json, flavor: Json, found: Json | None, wanted: Amounts, place: Place) -> tuple[str, str]:
    """Why a flavor can never hold what is wanted, and what it lacks now; both empty when it can start at once."""
    if found is None:
        return "the ResourceFlavor does not exist", ""
    labels = found["spec"].get("nodeLabels", {}) if "spec" in found else {}
    for key, value in labels.items():
        if place.node_selector.get(key, value) != value:
            return f"its nodes have {key}={value}, the job asks for {place.node_selector[key]}", ""
    used: dict[str, Json] = {}
    for each in cluster.get("status", {}).get("flavorsUsage", []):
        if each["name"] == flavor["name"]:
            used = {entry["name"]: entry for entry in each["resources"]}
    cohort = cluster["spec"].get("cohortName") or cluster["spec"].get("cohort")
    lacking, waits = [], []
    for entry in flavor["resources"]:
        amount = wanted.get(entry["name"])
        if amount is None:
            continue
        own = quantity(entry["nominalQuota"])
        limit = entry.get("borrowingLimit")
        most = None if cohort and limit is None else own + (quantity(limit) if cohort and limit else 0)
        if most is not None and amount > most:
            lacking.append(f"{entry['name']} {size(entry['name'], most)} of {size(entry['name'], amount)}")
        free = own - quantity(used.get(entry["name"], {}).get("total", 0))
        if amount > free:
            waits.append(f"{entry['name']} {size(entry['name'], free)} of {size(entry['name'], amount)} free")
    return ", ".join(lacking), ", ".join(waits)


def namespace_quota(target: Target) -> Iterator[Finding]:
    """ResourceQuotas of the namespace against a training job with the step that waits for it."""
    space = target.profile.namespace
    wanted: Amounts = {}
    for place in places(target):
        if place.name == "device step":
            continue
        for resource, amount in place.total.items():
            wanted[resource] = wanted.get(resource, Decimal(0)) + amount
    for found in target.kube.get(f"/api/v1/namespaces/{space}/resourcequotas")["items"]:
        name = found["metadata"]["name"]
        hard, used = found["spec"].get("hard", {}), found.get("status", {}).get("used", {})
        lacking, waits = [], []
        for key, most in hard.items():
            resource = re.sub(r"^(requests|limits)\.", "", key)
            if resource not in wanted:
                continue
            amount = wanted[resource]
            free = quantity(most) - quantity(used.get(key, 0))
            if amount > quantity(most):
                lacking.append(f"{key} {most} of {size(key, amount)}")
            elif amount > free:
                waits.append(f"{key} {size(key, free)} of {size(key, amount)} free")
        fix = f"kubectl -n {space} edit resourcequota {name}"
        if lacking:
            yield Finding("fail", "quota", f"ResourceQuota {name} is less than a run needs: {', '.join(lacking)}", fix)
        elif waits:
            text = f"ResourceQuota {name} is used up for now: {', '.join(waits)}"
            yield Finding("warn", "quota", text, f"kubectl -n {space} describe resourcequota {name}")
        else:
            yield Finding("ok", "quota", f"ResourceQuota {name} leaves room")
