"""A package, for torch-fidelity installs one of this name: Ray's workers would find that one."""
