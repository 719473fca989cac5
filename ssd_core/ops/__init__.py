"""The public functions: checks, choice of a backend, autograd."""
