"""The OCI runtime (runtime-spec 1.2): a bundle becomes processes in namespaces and cgroups. Knows nothing of VMs."""
