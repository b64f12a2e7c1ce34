"""Help for guests on hosts whose KVM emulates ring 0 in software (docs/software-kvm.md). Not loaded on hardware KVM."""
