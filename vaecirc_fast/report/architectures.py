"""What the methods say of architectures and data sets by name: objectives, references, where images come from."""

from __future__ import annotations

from markupsafe import Markup

_KL = "KL(<i>q</i>(<i>z</i>|<i>x</i>) ‖ <i>p</i>(<i>z</i>))"
_R = "<i>R</i>"
_Z = "<i>q</i>(<i>z</i>)"
_TC = f"KL({_Z} ‖ ∏<sub><i>l</i></sub> <i>q</i>(<i>z<sub>l</sub></i>))"
_PENALTY = (
    "<i>λ</i><sub>od</sub> Σ<sub><i>i</i>≠<i>j</i></sub> <i>C<sub>ij</sub></i><sup>2</sup> + "
    "<i>λ</i><sub>d</sub> Σ<sub><i>i</i></sub> (<i>C<sub>ii</sub></i> − 1)<sup>2</sup>"
)
_KINGMA = "Kingma and Welling 2014 (arXiv 1312.6114)"

# Name: the loss that was minimised, R the expected reconstruction loss; and whose it is.
OBJECTIVES: dict[str, tuple[Markup, str]] = {
    "vae": (Markup(f"{_R} + {_KL}"), _KINGMA),
    "beta_vae": (Markup(f"{_R} + <i>β</i> {_KL}"), "Higgins et al. 2017 (ICLR)"),
    "annealed_vae": (
        Markup(f"{_R} + <i>γ</i> |{_KL} − <i>C</i>|, <i>C</i> rising from 0 during training"),
        "Burgess et al. 2018 (arXiv 1804.03599)",
    ),
    "factor_vae": (
        Markup(f"{_R} + {_KL} + <i>γ</i> {_TC}, the last estimated by a discriminator"),
        "Kim and Mnih 2018 (arXiv 1802.05983)",
    ),
    "beta_tcvae": (Markup(f"{_R} + {_KL} + (<i>β</i> − 1) {_TC}"), "Chen et al. 2018 (arXiv 1802.04942)"),
    "dip_vae_i": (
        Markup(f"{_R} + {_KL} + {_PENALTY}, <i>C</i> = Cov<sub><i>x</i></sub>[<i>μ</i>]"),
        "Kumar, Sattigeri and Balakrishnan 2018 (arXiv 1711.00848)",
    ),
    "dip_vae_ii": (
        Markup(
            f"{_R} + {_KL} + {_PENALTY}, <i>C</i> = Cov<sub><i>x</i></sub>[<i>μ</i>] + E<sub><i>x</i></sub>[diag "
            f"<i>σ</i><sup>2</sup>]"
        ),
        "Kumar, Sattigeri and Balakrishnan 2018 (arXiv 1711.00848)",
    ),
    "vq_vae": (
        Markup(
            f"{_R} + <i>c</i> ‖<i>z</i><sub>e</sub> − sg[<i>z</i><sub>q</sub>]‖<sup>2</sup>, <i>c</i> the commitment, "
            "<i>z</i><sub>q</sub> the nearest of <i>K</i> codes, which are moving averages"
        ),
        "van den Oord, Vinyals and Kavukcuoglu 2017 (arXiv 1711.00937)",
    ),
}

# Data sets without their official files: what they are then.
STAND_INS = {
    "dsprites": "redrawn from its geometry, not read from the official file",
    "digits": "the 8 × 8 handwritten digits that scikit-learn brings along",
    "shapes3d_like": "rendered rooms with the factors of 3D Shapes, a stand-in that is not that data set",
    "mpi3d_like": "a rendered arm with the factors of MPI3D, a stand-in that is not that data set",
    "norb_like": "rendered objects with the factors of SmallNORB, a stand-in that is not that data set",
    "faces_like": "procedural faces with attributes, a stand-in for CelebA that is not that data set",
    "scm_sprites": "sprites whose factors follow a known structural causal model",
}
