"""What users have, as arrays and tensors of numbers, and errors that name one of these."""

from pyro_mdn.support.arrays.conversion import (
    Array,
    as_array,
    as_tensor,
    columns_of,
    in_columns,
    is_frame,
    names_of_columns,
    require_columns,
    to_numpy,
)
from pyro_mdn.support.arrays.refusals import among, further_on, refuse, require_finite, require_no_infinity

__all__ = [
    "Array",
    "among",
    "as_array",
    "as_tensor",
    "columns_of",
    "further_on",
    "in_columns",
    "is_frame",
    "names_of_columns",
    "refuse",
    "require_columns",
    "require_finite",
    "require_no_infinity",
    "to_numpy",
]
