"""Fill a team's values into the manifests.

    python -m manifests.render --values team.yaml -o build/manifests
    python -m manifests.render --values team.yaml -o build/manifests --only cluster
    python -m manifests.render --describe

Every `${name}` is replaced; a value that is needed and not set is refused by name. Quotas follow from the number of
nodes and from what the profiles ask of a node, so that they cannot disagree.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from pydantic import Field, NonNegativeInt, field_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.presets import Presets, check
from modelmill.components.core.recipe import Section
from modelmill.pipelines.platform import load_profile

SOURCE = Path(__file__).resolve().parent
PARTS = ("base", "components", "overlays", "cluster")
_PLACEHOLDER = re.compile(r"\$\{([a-z0-9_]+)\}")
_FORMS = {
    "account": r"[0-9]{12}",
    "region": r"[a-z]{2}(-[a-z]+)+-[0-9]",
    "cluster": r"[a-z0-9][a-z0-9-]{0,62}",
    "kubernetes_version": r"1\.[0-9]{2}",
    "bucket": r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]",
    "registry": r"[a-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)*",
    "cpu_digest": r"sha256:[0-9a-f]{64}",
    "mlflow_digest": r"sha256:[0-9a-f]{64}",
    "mlflow_host": r"[a-z0-9.-]+",
    "vpc": r"vpc-[0-9a-f]+",
    "subnet_a": r"subnet-[0-9a-f]+",
    "subnet_b": r"subnet-[0-9a-f]+",
    "accelerator_subnet": r"subnet-[0-9a-f]+",
    "node_security_group": r"sg-[0-9a-f]+",
    "node_ami": r"al2023@v[0-9]{8}",
    "fsx_id": r"fs-[0-9a-f]+",
    "fsx_mount_name": r"[a-z0-9]+",
    "fsx_security_group": r"sg-[0-9a-f]+",
    "oidc_provider": r"[a-z0-9./-]+",
}


class Values(Section):
    """What only a team knows about its account; empty text is not set."""

    account: str = Field(default="", description="AWS account, 12 digits, in quotes.")
    region: str = Field(default="", description="AWS region.")
    cluster: str = Field(default="", description="Name of the EKS cluster.")
    kubernetes_version: str = Field(default="", description="Kubernetes version of the cluster, in quotes.")
    bucket: str = Field(default="", description="Bucket of artifacts and data.")
    registry: str = Field(default="", description="Registry and path before an image's name.")
    cpu_digest: str = Field(default="", description="Digest of the cpu image, as its push printed it (sha256:...).")
    mlflow_digest: str = Field(default="", description="Digest of the MLflow image (sha256:...).")
    mlflow_host: str = Field(default="", description="Host name under which people open MLflow.")
    vpc: str = Field(default="", description="VPC of the cluster (vpc-...).")
    subnet_a: str = Field(default="", description="Private subnet in a first zone (subnet-...).")
    subnet_b: str = Field(default="", description="Private subnet in a second zone.")
    accelerator_subnet: str = Field(default="", description="Private subnet in the zone of reservations and of FSx.")
    node_security_group: str = Field(default="", description="Security group of nodes, all traffic within it allowed.")
    node_ami: str = Field(default="", description="EKS image release, al2023@vYYYYMMDD; never latest.")
    fsx_id: str = Field(default="", description="FSx for Lustre file system of the home (fs-...).")
    fsx_mount_name: str = Field(default="", description="Mount name that FSx gave the file system.")
    fsx_security_group: str = Field(default="", description="Security group of FSx: ports 988 and 1018-1023.")
    oidc_provider: str = Field(default="", description="Issuer without https://, only for roles without Pod Identity.")
    nodes_cpu: NonNegativeInt = Field(default=4, description="Most m7i.8xlarge nodes of training jobs.")
    nodes_g6: NonNegativeInt = Field(default=0, description="Most g6.48xlarge nodes.")
    nodes_p4d: NonNegativeInt = Field(default=0, description="Most p4d.24xlarge nodes.")
    nodes_p5: NonNegativeInt = Field(default=0, description="Most p5.48xlarge nodes.")
    nodes_p5_reserved: NonNegativeInt = Field(default=0, description="Of these, reserved nodes that are always up.")
    nodes_trn1: NonNegativeInt = Field(default=0, description="Most trn1.32xlarge nodes.")
    nodes_trn2: NonNegativeInt = Field(default=0, description="Most trn2.48xlarge nodes.")
    step_cpus: NonNegativeInt = Field(default=64, description="CPUs for steps, besides those of training jobs.")
    step_gpus: NonNegativeInt = Field(default=4, description="Most single-GPU nodes of steps.")

    @field_validator(*_FORMS)
    @classmethod
    def _has_its_form(cls, value: str, info: object) -> str:
        name = getattr(info, "field_name", "")
        if value and not re.fullmatch(_FORMS[name], value):
            raise ValueError(f"{value!r} is not of the form {_FORMS[name]}")
        return value

    def filled(self) -> dict[str, str]:
        """Every placeholder's text, empty for what is not set; quotas and limits follow from the numbers of nodes."""
        texts = {name: str(value) for name, value in self.model_dump().items()}
        for name in ("cpu", "g6", "p4d", "p5", "trn1", "trn2"):
            texts |= _quota(name, name, getattr(self, f"nodes_{name}"))
        texts |= _quota("p5_reserved", "p5", self.nodes_p5_reserved)
        texts["cpu_pool_cpu"] = str(32 * self.nodes_cpu + self.step_cpus)  # a whole m7i.8xlarge has 32
        return texts


def _quota(prefix: str, profile: str, nodes: int) -> dict[str, str]:
    """What the jobs of a profile may ask in all when they fill a number of nodes."""
    job = load_profile(f"eks-{profile}").trainjob
    assert job is not None
    memory = re.fullmatch(r"(\d+)Gi", job.memory)
    if memory is None:
        raise UserError(f"trainjob.memory: {job.memory!r} in eks-{profile}; write it in Gi, quotas are made of it")
    each = {"cpu": int(job.cpu), "devices": job.devices_per_node, "efa": job.efa_per_node}
    quota = {f"{prefix}_{name}": str(nodes * amount) for name, amount in each.items()}
    return {**quota, f"{prefix}_memory": f"{nodes * int(memory[1])}Gi"}


def load_values(path: Path) -> Values:
    """Read and check a team's values.

    Raises:
        UserError: one line naming the file or the value and what is wrong with it.
    """
    presets = Presets("values", (SOURCE,), "--values", "", "python -m manifests.render --describe")
    return check(Values, presets.read(str(path)), "values")


def render(values: Values, target: Path, only: str | None = None) -> list[Path]:
    """Write the manifests with the values filled in; returns what was left out for want of an optional value.

    Raises:
        UserError: the values that are needed and not set, by name, or the target holds something else.
    """
    texts = values.filled()
    optional = {"oidc_provider"}
    files = [path for part in ([only] if only else PARTS) for path in sorted((SOURCE / part).rglob("*"))]
    rendered: dict[Path, str] = {}
    missing: set[str] = set()
    left_out: list[Path] = []
    for path in filter(Path.is_file, files):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(SOURCE)
        used = set(_PLACEHOLDER.findall(text))
        if unknown := sorted(used - texts.keys()):
            raise UserError(f"manifests/{name}: no value is called {', '.join(unknown)}; add it to Values")
        unset = {word for word in used if not texts[word]}
        if unset and unset <= optional:
            left_out.append(name)
            continue
        missing |= unset - optional
        rendered[name] = _PLACEHOLDER.sub(lambda match: texts[match[1]], text)
    if missing:
        raise UserError(f"values: {', '.join(sorted(missing))} not set; --describe says what they are")
    if target.exists() and any(target.iterdir()) and not (target / ".modelmill-manifests").exists():
        raise UserError(f"-o: {target} holds files that are not manifests of ours; name another folder")
    for part in [only] if only else PARTS:
        shutil.rmtree(target / part, ignore_errors=True)
    for name, text in rendered.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
        shutil.copymode(SOURCE / name, target / name)
    (target / ".modelmill-manifests").touch()
    return left_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m manifests.render", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--values", type=Path, help="YAML file with the values of the team")
    parser.add_argument("-o", "--output", type=Path, help="folder for the rendered manifests")
    parser.add_argument("--only", choices=PARTS, help="one part, which may need fewer values")
    parser.add_argument("--describe", action="store_true", help="say what each value is")
    options = parser.parse_args(arguments)
    if options.describe:
        for name, field in Values.model_fields.items():
            print(f"{name:20} {field.description}")
        return 0
    if not options.values or not options.output:
        parser.error("--values and -o are needed")
    try:
        left_out = render(load_values(options.values), options.output, options.only)
    except UserError as error:
        print(f"manifests: {error}", file=sys.stderr)
        return 2
    for path in left_out:
        print(f"left out {path}: it needs oidc_provider, which is not set")
    print(f"rendered into {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
