"""The mathematics of each op in plain torch: the truth that kernels are tested against, and a backend."""
