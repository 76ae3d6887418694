"""Triton kernels, installed as `vaecirc_fast.triton_kernels`: one file an op, with its launch function."""

if __name__ != "vaecirc_fast.triton_kernels":
    raise ImportError(
        f"this is vaecirc_fast.triton_kernels, imported as {__name__!r}: install the project (`pip install -e .`) "
        "and import it from vaecirc_fast; the top-level name belongs to other packages"
    )
