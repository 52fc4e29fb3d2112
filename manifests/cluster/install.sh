#!/usr/bin/env bash
# Operators and plugins, by pinned charts, in the order they need one another. Run it from the rendered folder; running
# it again upgrades. Before it: the cluster, and Karpenter's CloudFormation stack (docs/operations.md).
set -euo pipefail
cd "$(dirname "$0")"

chart() { # name namespace chart version [repository]
    local name=$1 namespace=$2 chart=$3 version=$4
    helm upgrade --install "$name" "$chart" --version "$version" ${5:+--repo "$5"} \
        --namespace "$namespace" --create-namespace --values "helm/$name.yaml" --wait --timeout 10m
}

# Nodes.
chart karpenter kube-system oci://public.ecr.aws/karpenter/karpenter 1.14.1
# Devices and network of accelerator nodes.
chart nvidia-device-plugin kube-system nvidia-device-plugin 0.20.0 https://nvidia.github.io/k8s-device-plugin
chart neuron kube-system oci://public.ecr.aws/neuron/neuron-helm-chart 1.9.0
chart aws-efa-k8s-device-plugin kube-system aws-efa-k8s-device-plugin v0.5.30 https://aws.github.io/eks-charts
# Storage.
chart aws-fsx-csi-driver kube-system aws-fsx-csi-driver 1.17.0 https://kubernetes-sigs.github.io/aws-fsx-csi-driver
# Jobs: Trainer brings JobSet; Kueue decides what may start.
chart kubeflow-trainer kubeflow-system oci://ghcr.io/kubeflow/charts/kubeflow-trainer 2.3.0
chart kueue kueue-system oci://registry.k8s.io/kueue/charts/kueue 0.19.2
