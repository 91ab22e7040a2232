r"""Products of families, for outputs of different kinds, and what the argument ``family`` of a constructor means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from pyro_mdn.distributions.covariance.noise_models import Diagonal, NoiseModel, as_noise_model
from pyro_mdn.distributions.families.family import Block, Family
from pyro_mdn.distributions.families.products.columns import Columns
from pyro_mdn.distributions.families.products.product_components import ProductComponents
from pyro_mdn.distributions.families.products.product_units import PerPart
from pyro_mdn.distributions.units.compound_transforms import PerOutput, as_transform
from pyro_mdn.distributions.units.target_transforms import Standardize, TargetTransform
from pyro_mdn.support.checks import is_count, shown

__all__ = ["Product", "as_family"]

Transforms = Sequence[TargetTransform | str | None]


@dataclass(frozen=True)
class Product(Family, by_name=False):
    r"""Outputs of different kinds, such as a price and a count: each component is a product of a family for each.

    .. math:: p_k(y) = \prod_j p_{kj}(y_{G_j})

    The outputs are those of the first part, then those of the second one, and so on. Outputs of one part may be
    dependent within a component, by the noise model of its family. Dependence between parts is that of the mixture:
    what is known of one part changes the weights of the components, and so the distribution of the others.

    A target transform for each output goes beside it, ``None`` for that of its family, which is the only one of counts;
    a single one is that of all outputs that are no counts. Each part has its own noise model, shared, homoscedastic or
    fixed as it says.

    Args:
        families: Families of the parts, or their names.
        sizes: Number of outputs of each part, by default one.

    Raises:
        ValueError: If there is no family, one is itself a product, or the sizes are no positive integers, one for each.

    References:
        Everitt (1988), A finite mixture model for the clustering of mixed-mode data.

    >>> import torch
    >>> from pyro_mdn import MixtureDensityNetwork
    >>> family = Product(("normal", "negative_binomial"))
    >>> network = MixtureDensityNetwork(1, 2, family=family, target_transform=["log", None])
    >>> network(torch.zeros(3, 1)).condition([[2.0]], [0]).icdf(0.5).shape  # the count, given the positive number
    torch.Size([3, 1])
    """

    is_product: ClassVar[bool] = True

    noise: NoiseModel = field(init=False, repr=False, default=Diagonal())
    families: Sequence[Family | str] = ()
    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        given: Any = self.families
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(f"families: expected a sequence of families or names, one at least, got {shown(given)}")
        families = tuple(Family.named(family)() if isinstance(family, str) else family for family in given)
        for family in families:
            if not isinstance(family, Family) or isinstance(family, Product):
                raise ValueError(f"families: expected families that are no products, or names, got {shown(family)}")
        sizes: Any = (1,) * len(families) if self.sizes is None else self.sizes
        if not isinstance(sizes, list | tuple) or len(sizes) != len(families) or not all(map(is_count, sizes)):
            raise ValueError(
                f"sizes: expected {len(families)} positive integers, one for each family, got {shown(sizes)}"
            )
        object.__setattr__(self, "families", families)
        object.__setattr__(self, "sizes", tuple(int(size) for size in sizes))

    @classmethod
    def with_noise(cls, noise: NoiseModel) -> Self:
        raise ValueError(f"noise: expected None beside a product, whose families have their own, got {shown(noise)}")

    @property
    def parts(self) -> list[tuple[Family, int]]:
        """Family and number of outputs of each part."""
        families: Any = self.families
        sizes: Any = self.sizes
        return list(zip(families, sizes, strict=True))

    @property
    def columns(self) -> Columns:
        """Outputs of each part."""
        return Columns.of_sizes([size for _, size in self.parts])

    @property
    def has_atom(self) -> bool:
        return any(family.has_atom for family, _ in self.parts)

    # Parameters

    def blocks(self, dim: int) -> list[Block]:
        self._require(dim)
        return [block for family, size in self.parts for block in family.blocks(size)]

    def start(self, scale: Tensor) -> list[Tensor]:
        scales = self.columns.split(scale)
        return [raw for (family, _), own in zip(self.parts, scales, strict=True) for raw in family.start(own)]

    def start_locs(self, centres: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Tensor:
        return self.columns.join([part.start_locs(*own) for part, *own in self._with_parameters(centres, blocks, unit)])

    def build(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> ProductComponents:
        parts = [family.build(*own) for family, *own in self._with_parameters(locs, blocks, unit)]
        return ProductComponents(tuple(parts), self.columns)

    def _with_parameters(self, locs: Tensor, blocks: Sequence[Tensor], unit: Tensor) -> Iterator[Any]:
        """Iterate over the families, each with its locations, its blocks and its units."""
        rest, columns = list(blocks), self.columns
        units = columns.split(unit.expand(*unit.shape[:-1], columns.dim))
        for (family, size), own, scale in zip(self.parts, columns.split(locs), units, strict=True):
            count = len(family.blocks(size))
            yield family, own, rest[:count], scale[..., :1] if family.noise.common_unit else scale
            rest = rest[count:]

    # Target transforms

    def transform_for(self, given: TargetTransform | str | Transforms | None, dim: int) -> TargetTransform:
        self._require(dim)
        parts = [
            family.transform_for(own, size) for (family, size), own in zip(self.parts, self._apart(given), strict=True)
        ]
        families = [family for family, _ in self.parts]
        common, atoms = [f.noise.common_unit for f in families], [f.has_atom for f in families]
        transform = PerPart(tuple(parts), [size for _, size in self.parts], common, atoms)
        if isinstance(given, PerPart) and given != transform:
            raise ValueError(f"target_transform: expected {transform} beside {self}, got {given}")
        return transform

    def _apart(self, given: Any) -> list[Any]:
        """Transform of each part, or what stands for it."""
        if isinstance(given, PerPart):
            if len(given.transforms) != len(self.parts):
                raise ValueError(f"target_transform: expected {len(self.parts)} parts, got {given}")
            beside = zip(self.parts, given.transforms, strict=True)
            return [own if family.target_transform is None else None for (family, _), own in beside]
        each = given.transforms if isinstance(given, PerOutput) else given
        if not isinstance(each, list | tuple):
            as_transform(each)  # an error for what is none
            return [each if family.target_transform is None else None for family, _ in self.parts]
        if len(each) != self.columns.dim:
            expected = f"{self.columns.dim} transforms, one for each output, or a single one"
            raise ValueError(f"target_transform: expected {expected}, got {len(each)}")
        own = [[each[d] for d in columns] for columns in self.columns.of_parts]
        return [self._single(family, transforms) for (family, _), transforms in zip(self.parts, own, strict=True)]

    @staticmethod
    def _single(family: Family, given: list[TargetTransform | str | None]) -> TargetTransform | None:
        """One transform for the outputs of a part; counts may be given as outputs that are standardised."""
        if all(transform is None for transform in given):
            return None  # that of the family
        transforms = [as_transform(transform) for transform in given]
        if family.target_transform is not None:
            others = [t for t in transforms if not isinstance(t, Standardize)]
            return others[0] if others else None
        return transforms[0] if len(set(transforms)) == 1 else PerOutput(tuple(transforms))

    def _require(self, dim: int) -> None:
        if dim != self.columns.dim:
            raise ValueError(f"family: expected {self.columns.dim} outputs for {self}, got dim_out={dim}")

    @classmethod
    def _built(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "families": tuple(Family.from_config(family) for family in settings.get("families", ()))}


def as_family(
    family: Family | str | Sequence[Family | str] | None,
    noise: NoiseModel | str | None,
    dim_out: int,
    default: type[Family],
) -> Family:
    """Return the family that the arguments ``family`` and ``noise`` of a constructor stand for.

    Several families are a :class:`Product` with one output each.

    Raises:
        ValueError: If no family or noise model has the name given, or if a noise model is given beside a ``Family`` or
            several, which have their own.
    """
    if isinstance(family, list | tuple):
        family = Product(tuple(family))
    if isinstance(family, Family):
        if noise is not None:
            raise ValueError(f"noise: expected None beside {family}, which has its noise model, got {shown(noise)}")
        return family
    kind = default if family is None else Family.named(family)
    return kind.with_noise(as_noise_model(noise, dim_out))
