"""Other people's quantizers with the interface of `LooCQuantizer`, for comparisons in every model of this package.

Assign one to a model: `model.quantize = ResidualQuantizer(128, 256, depth=4)`. It returns the tuple of diffusers'
`VectorQuantizer`, has the rate of its codes (`bits_per_position`) and the size of its codebooks (`codebook_scalars`),
and its `revive()` must be called once per optimizer step, like LooC's.

LooC and `ProductQuantizer`, which is made of its parts, use the rotation trick by default. The others pass gradients
straight through, as published. To compare the quantizers alone, give LooC and PQ `gradient="straight-through"`.
"""

from looc_ldm.baselines.factorized import FactorizedQuantizer
from looc_ldm.baselines.library import (
    BinarySphericalQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
    ResidualSimVQQuantizer,
)
from looc_ldm.baselines.product import ProductQuantizer
from looc_ldm.baselines.spherical import GroupSphericalQuantizer
from looc_ldm.baselines.stochastic import StochasticQuantizer, gaussian_likelihood

__all__ = [
    "BinarySphericalQuantizer",
    "FactorizedQuantizer",
    "FiniteScalarQuantizer",
    "GroupSphericalQuantizer",
    "LookupFreeQuantizer",
    "ProductQuantizer",
    "ResidualFiniteScalarQuantizer",
    "ResidualQuantizer",
    "ResidualSimVQQuantizer",
    "StochasticQuantizer",
    "gaussian_likelihood",
]
