"""Floor 3: hosts that take any mechanism, and their variants as tables, registered in timm."""

from . import agent_variants as agent_variants
from . import circulant_variants as circulant_variants
from . import compact_variants as compact_variants
from . import cswin_variants as cswin_variants
from . import dyn_perceiver_variants as dyn_perceiver_variants
from . import h_vittt_variants as h_vittt_variants
from . import mlla_variants as mlla_variants
from . import pvt_v2_variants as pvt_v2_variants
from . import pvt_variants as pvt_variants
from . import siamese_variants as siamese_variants
from . import steps_variants as steps_variants
from . import swin_variants as swin_variants
from . import ttt_variants as ttt_variants
from . import vca_variants as vca_variants
from . import vit_variants as vit_variants
from . import weightformer_variants as weightformer_variants
from ._plan import Choice, plan
from ._published import published_keys
from ._registry import (
    ARCHITECTURES,
    HOSTS,
    VARIANTS,
    Architecture,
    Host,
    Variant,
    add_architectures,
    add_hosts,
    add_variants,
    create_model,
    default_attention,
)
from ._streams import Mix, Sample, StreamPlan, Streams, sampled
from ._windows import fit_bias_table

__all__ = [
    "ARCHITECTURES",
    "HOSTS",
    "VARIANTS",
    "Architecture",
    "Choice",
    "Host",
    "Mix",
    "Sample",
    "StreamPlan",
    "Streams",
    "Variant",
    "add_architectures",
    "add_hosts",
    "add_variants",
    "create_model",
    "default_attention",
    "fit_bias_table",
    "plan",
    "published_keys",
    "sampled",
]
