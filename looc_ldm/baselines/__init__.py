"""Other people's quantizers with the interface of `LooCQuantizer`: each goes into every model of this package.

For comparisons. A quantizer is assigned to the model, `model.quantize = ResidualQuantizer(128, 256, depth=4)`; it
returns the tuple of diffusers' `VectorQuantizer`, says what its codes cost (`bits_per_position`) and how many numbers
its codebooks hold (`codebook_scalars`), and its `revive()` is to be called once per optimizer step, as LooC's.

LooC's gradients turn with the segments by default, and so do those of `ProductQuantizer`, which is made of its parts;
the others pass them straight through, as published. Where the quantizers alone are to be compared, LooC and PQ take
`gradient="straight-through"`.
"""

from looc_ldm.baselines.factorized import FactorizedQuantizer
from looc_ldm.baselines.hierarchical import AssignedQuantizer, HierarchicalVQModel, summed_squared_error
from looc_ldm.baselines.library import (
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualFiniteScalarQuantizer,
    ResidualQuantizer,
)
from looc_ldm.baselines.product import ProductQuantizer
from looc_ldm.baselines.stochastic import StochasticQuantizer, gaussian_likelihood

__all__ = [
    "AssignedQuantizer",
    "FactorizedQuantizer",
    "FiniteScalarQuantizer",
    "HierarchicalVQModel",
    "LookupFreeQuantizer",
    "ProductQuantizer",
    "ResidualFiniteScalarQuantizer",
    "ResidualQuantizer",
    "StochasticQuantizer",
    "gaussian_likelihood",
    "summed_squared_error",
]
