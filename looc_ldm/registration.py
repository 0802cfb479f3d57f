"""Makes diffusers save and load our components as `["looc_ldm", class name]`.

diffusers resolves a component's class from its table of loadable libraries, and treats every other library as code
that came with the repository. The table is not part of its public interface: a test loads a saved pipeline.
"""

from diffusers.pipelines import pipeline_loading_utils

_METHODS = ["save_pretrained", "from_pretrained"]
_COMPONENTS = {"LooCVQModel": _METHODS, "ClassEmbedding": _METHODS, "FixedHeadsUNet2DModel": _METHODS}

pipeline_loading_utils.LOADABLE_CLASSES["looc_ldm"] = _COMPONENTS
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_COMPONENTS)
