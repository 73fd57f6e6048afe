"""Attention of diffusers' models: DiT, PixArt, U-Nets as of Stable Diffusion, SD3 and FLUX.

A mechanism is put there as an attention processor, so a model's `attn_processors` and `set_attn_processor` go on as
ever, and what it learns is in the state dict under `<attention>.processor.mixing`. Cross-attention stays as it is.

Tokens of a text that are mixed together with those of an image are prefix tokens here: they are in front, as FLUX has
them, where SD3 has them behind. diffusers is imported once a module of it is met.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from linsight.errors import LinsightError

from .._place import check_prefix
from ..mixing import Mixing
from ..place import Locator, Place
from .diffusers_processors import Flux, Joint, Plain, Processor
from .seam import Heads, Images, Part, Seam, around


class Latents(Locator):
    """A forward pre-hook of a model or a level that is given latents `(B, C, H, W)`, first or as `hidden_states`."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the grid by the size of the latents."""
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor) and given.ndim != 4:
            raise LinsightError(
                f"hidden_states of shape {tuple(given.shape)} tell no height and width of tokens: convert with grid="
            )
        super().__call__(module, args, kwargs)


class Packed(Locator):
    """A forward pre-hook of a model that is given tokens `(B, N, C)` and, for each, its place: FLUX's `img_ids`."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the grid by the rows and columns that are told, and the number of tokens in front by the text.

        Raises:
            LinsightError: they are not those of one grid, row by row.
        """
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids, text = given.get("img_ids"), given.get("encoder_hidden_states")
        if ids is None or text is None:
            return
        rows, columns = (ids[0] if ids.ndim == 3 else ids)[:, -2:].unbind(1)
        width = int((rows == rows[0]).sum())
        height = len(rows) // width
        lies = len(rows) == height * width
        if lies:
            rows, columns = rows.view(height, width), columns.view(height, width)
            lies = bool((rows == rows[:, :1]).all() & (columns == columns[:1]).all())
        if not lies:
            raise LinsightError(
                f"img_ids: these {rows.numel()} places are not those of one grid, row by row: convert with grid='1d', "
                f"for which tokens are a sequence"
            )
        self.place.grid, self.place.prefix = (height, width), text.shape[1]


# Processors that compute softmax attention and no more; the scale of those of torch is d^(-1/2) whatever the model's.
_PLAIN = ("AttnProcessor2_0", "AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor")
_KINDS: Mapping[str, type[Processor]] = {
    **dict.fromkeys(_PLAIN, Plain),
    **dict.fromkeys(("JointAttnProcessor2_0", "XFormersJointAttnProcessor"), Joint),
    "FluxAttnProcessor": Flux,
}
_OTHERS = {  # by a part of their name: why not, and the way out
    "Fused": "its projections are fused: call unfuse_qkv_projections() first",
    "IPAdapter": "an IP-adapter adds to it what no mechanism takes over: unload it first",
    "Sana": "it is linear attention already",
}
_ROLES = {"add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v", "to_add_out": "out"}


class Diffusers(Seam):
    """See the module."""

    library: ClassVar[str] = "diffusers"

    def knows(self, module: Any) -> bool:
        """See `Seam`: attention of tokens among themselves that is not converted yet."""
        if not _of_diffusers(module):
            return False
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_flux import FluxAttention

        if not isinstance(module, Attention | FluxAttention) or isinstance(module.processor, Processor):
            return False
        return not getattr(module, "is_cross_attention", False)

    def heads(self, module: Any) -> Heads:
        """See `Seam`."""
        kind = _kind(module)
        if kind is Flux and getattr(module, "fused_projections", False):
            raise LinsightError(_OTHERS["Fused"])
        dim, width, joined = module.inner_dim, module.query_dim, module.added_kv_proj_dim
        if getattr(module, "inner_kv_dim", dim) != dim:
            raise LinsightError(f"{module.heads} heads of queries share those of keys and values")
        if joined not in (None, width):
            raise LinsightError(f"tokens of text and image have {joined} and {width} channels: a mechanism takes one")
        scaled = kind is Plain and type(module.processor).__name__ != _PLAIN[0]
        return Heads(module.heads, dim, width, module.scale if scaled else None)

    def parts(self, module: Any) -> Mapping[str, tuple[Part, ...]]:
        """See `Seam`."""
        found: dict[str, list[Part]] = {}
        for name, _ in module.named_parameters():
            top = name.partition(".")[0]
            role = _ROLES.get(top, top.removeprefix("to_") if top.startswith("to_") else "")
            role = "norm" if top.startswith("norm_") else role
            if role:
                found.setdefault(role, []).append(Part(name))
        return {role: tuple(parts) for role, parts in found.items()}

    def images(self, model: nn.Module, name: str) -> Images | None:
        """See `Seam`: in a U-Net the level of the attention, whose feature maps lie as its tokens do.

        Raises:
            LinsightError: there are tokens behind those of the image.
        """
        from diffusers import ModelMixin

        if type(model.get_submodule(name.rpartition(".")[0])).__name__ == "GatedSelfAttentionDense":
            raise LinsightError("objects of GLIGEN are mixed with the image here: leave it out by layers='*.attn1'")
        owner: Any = around(model, name, lambda module: isinstance(module, ModelMixin))
        if owner is None or "patch_size" not in owner.config or getattr(owner, "is_input_vectorized", False):
            return None  # a feature map, which tells its size itself, or a sequence
        if "img_ids" in inspect.signature(owner.forward).parameters:
            return Images(owner, (1, 1), 0, hook=Packed)
        patch = owner.config["patch_size"] or 1
        return Images(owner, (patch, patch), 0, hook=Latents)

    def causal(self, model: nn.Module, name: str) -> bool:
        """See `Seam`: none of these processors hides later tokens, whatever the module says."""
        return False

    def check(self, model: nn.Module, name: str, mixing: Mixing) -> None:
        """See `Seam`: with a text there are prefix tokens."""
        super().check(model, name, mixing)
        module: Any = model.get_submodule(name)
        if _kind(module) is Flux or module.added_kv_proj_dim is not None:
            check_prefix(type(mixing.core), 1)

    def maps_first(self, model: nn.Module, name: str) -> bool:
        """See `Seam`: of an image alone."""
        return _kind(model.get_submodule(name)) is Plain

    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """See `Seam`."""
        module: Any = model.get_submodule(name)
        module.set_processor(_kind(module)(mixing, place).train(module.training))

    def describe(self, model: Any) -> dict[str, Any] | None:
        """See `Seam`: the class and the config of a model."""
        if not _of_diffusers(model) or not hasattr(model, "config"):
            return None
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        return {"class": type(model).__name__, "config": config}

    def rebuild(self, described: Mapping[str, Any]) -> nn.Module:
        """See `Seam`.

        Raises:
            LinsightError: diffusers has no such model, or is not installed.
        """
        try:
            import diffusers
        except ImportError:
            raise LinsightError("its model is of diffusers: pip install 'linsight[ecosystem]'") from None
        kind = getattr(diffusers, str(described.get("class")), None)
        if not (inspect.isclass(kind) and issubclass(kind, diffusers.ModelMixin)):
            raise LinsightError(f"diffusers {diffusers.__version__} has no model {described.get('class')!r}")
        model: Any = kind
        return model.from_config(described["config"])


def _of_diffusers(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(module).__mro__)


def _kind(module: Any) -> type[Processor]:
    """The processor of ours that takes the place of a module's.

    Raises:
        LinsightError: that one computes something else than softmax attention.
    """
    found = type(module.processor)
    if found.__name__ in _KINDS and found.__module__.partition(".")[0] == "diffusers":
        return _KINDS[found.__name__]
    why = next((why for part, why in _OTHERS.items() if part in found.__name__), None)
    raise LinsightError(
        f"its processor is {found.__name__}: "
        + (why or "it may compute anything, so set one of diffusers' own first, or leave this layer out by layers=")
    )
