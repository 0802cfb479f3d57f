"""Other people's quantizers with the interface of `LooCQuantizer`, for comparisons in every model of this package.

Assign one to a model: `model.quantize = ResidualQuantizer(128, 256, depth=4)`. It returns the same tuple as diffusers'
`VectorQuantizer`. `bits_per_position` is its rate, and `codebook_scalars` the size of its codebooks. Call `revive()`
once per optimizer step, as with LooC.

LooC and `ProductQuantizer`, which is built from LooC's code, use the rotation trick by default. The others pass
gradients straight through, as published. To compare only the quantizers, give LooC and PQ
`gradient="straight-through"`.
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
