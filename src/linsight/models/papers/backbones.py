"""The papers of the hosts, with the code of their authors, and what timm calls those whose softmax weights it has."""

from linsight.attention import Paper, mechanism

from ..hosts.attnet import AttNet
from ..hosts.cswin import CSwinTransformer
from ..hosts.flow import FlowTransformer
from ..hosts.h_vit import HierarchicalViT
from ..hosts.l2vit import L2ViTransformer
from ..hosts.mlla import MLLATransformer
from ..hosts.nat import NATransformer
from ..hosts.pvt import PyramidVisionTransformer
from ..hosts.pvt_v2 import PyramidVisionTransformerV2
from ..hosts.ravlt import RAVLT, NaLaTransformer
from ..hosts.ravlt_linear import RAVLTLinear
from ..hosts.soft import SoftTransformer
from ..hosts.swin import SwinTransformer
from ..hosts.van import VisualAttentionNetwork
from ..hosts.vit import VisionTransformer
from ..registry import credit_hosts

credit_hosts(
    VisionTransformer,
    Paper("Training data-efficient image transformers & distillation through attention", "2012.12877", "ICML 2021"),
    "facebookresearch/deit",
    {f"vit_{size}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
)
credit_hosts(
    SwinTransformer,
    Paper("Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", "2103.14030", "ICCV 2021"),
    "microsoft/Swin-Transformer",
    {
        **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")},
        "swin_base_384": "swin_base_patch4_window12_384",
    },
)
credit_hosts(
    PyramidVisionTransformer,
    Paper(
        "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
        "2102.12122",
        "ICCV 2021",
    ),
    "whai362/PVT",
)
credit_hosts(
    PyramidVisionTransformerV2,
    Paper("PVT v2: Improved Baselines with Pyramid Vision Transformer", "2106.13797", "CVMJ 2022"),
    "whai362/PVT",
    {f"pvt_v2_{size}": f"pvt_v2_{size}" for size in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")},
)
credit_hosts(
    CSwinTransformer,
    Paper(
        "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
        "2107.00652",
        "CVPR 2022",
    ),
    "microsoft/CSWin-Transformer",
)

credit_hosts(MLLATransformer, mechanism("mlla").paper, "LeapLabTHU/MLLA")
credit_hosts(HierarchicalViT, mechanism("ttt").paper, "LeapLabTHU/ViTTT")
credit_hosts(SoftTransformer, mechanism("soft").paper, "fudan-zvg/SOFT")
credit_hosts(L2ViTransformer, mechanism("l2vit").paper, "ChuanyangZheng/L2ViT")
credit_hosts(NATransformer, mechanism("nat").paper, "SHI-Labs/Neighborhood-Attention-Transformer")
credit_hosts(FlowTransformer, mechanism("flowformer").paper, "thuml/Flowformer")
credit_hosts(RAVLT, mechanism("rala").paper, "qhfan/RALA")
credit_hosts(RAVLTLinear, mechanism("polaformerpp").paper, "ZacharyMeng/PolaFormerPP")
credit_hosts(NaLaTransformer, mechanism("nalaformer").paper, "ZacharyMeng/NaLaFormer")
credit_hosts(VisualAttentionNetwork, mechanism("lka").paper, "Visual-Attention-Network/VAN-Classification")
credit_hosts(AttNet, mechanism("atconv").paper, "price112/Attentive-Convolution")
