"""The softmax attention of linsight's own hosts, which stay what they are: any size, streamed, fused."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from linsight.attention import PROJECTIONS, Attention, Tokens, mechanism
from linsight.ops import Layout

from ..mixing import Mixing
from ..place import Place
from .adopt import adopt
from .seam import Heads, Images, Part, Seam


class Inherited(Attention):
    """A layer with the projections of another one around a mechanism."""

    def __init__(self, source: Attention, mixing: Mixing) -> None:
        nn.Module.__init__(self)
        adopt(self, source)
        del self.core
        self.mixing = mixing
        if not mixing.core.structure.reduced:
            self.reduction = None
        if mixing.centred:  # the mean of all keys is no state of the mechanism's
            mixing.core.structure = mixing.core.structure._replace(stream=False)

    @property
    def core(self) -> Any:  # type: ignore[override]
        """The mechanism's."""
        return self.mixing.core

    def tokens(self, x: Tensor, source: Tensor, layout: Layout, keep: Tensor | None) -> Tokens:
        """See `Attention`."""
        mixing, tokens = self.mixing, super().tokens(x, source, layout, keep)
        q, k = mixing.queries_and_keys(tokens.q, tokens.k, keep)
        return tokens._replace(q=q, k=k, extra=None if mixing.extra is None else mixing.extra(x))


class Ours(Seam):
    """See the module."""

    library: ClassVar[str] = "linsight"
    calls = False

    def knows(self, module: nn.Module) -> bool:
        """See `Seam`."""
        return type(module) is Attention and type(module.core) is mechanism("softmax").factory

    def heads(self, module: Any) -> Heads:
        """See `Seam`."""
        return Heads(module.num_heads, module.proj.in_features, module.dim)

    def parts(self, module: Any) -> Mapping[str, tuple[Part, ...]]:
        """See `Seam`."""
        found: dict[str, list[Part]] = {"q": [], "k": [], "v": []}
        for projection in PROJECTIONS[module.layout_name]:
            for place, role in enumerate(projection.parts):
                rows = slice(place * module.dim, (place + 1) * module.dim) if len(projection.parts) > 1 else None
                for key, _ in getattr(module, projection.name).named_parameters():
                    found[role].append(Part(f"{projection.name}.{key}", rows))
        found["out"] = [Part(f"proj.{key}") for key, _ in module.proj.named_parameters()]
        return {role: tuple(parts) for role, parts in found.items()}

    def images(self, model: nn.Module, name: str) -> Images | None:
        """See `Seam`: the hosts tell each layer where its tokens lie."""
        return None

    def put(self, model: nn.Module, name: str, mixing: Mixing, place: Place) -> None:
        """See `Seam`."""
        source = model.get_submodule(name)
        assert isinstance(source, Attention)
        model.set_submodule(name, Inherited(source, mixing))
