"""The columns of the manifest, the table with one row per slide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Name and type of each column.
MANIFEST = {
    "key": "str", "name": "str", "status": "str", "patches": "int", "edge": "int", "pen": "int",
    "blur": "int", "corrupt": "int", "grid": "int", "tissue": "int", "encoders": "str",
    "width": "int", "height": "int", "mpp": "float", "mpp_source": "str", "footprint_px": "float",
    "vendor": "str", "reader": "str", "path": "str", "bytes": "int", "quick_hash": "str",
    "reason": "str", "message": "str", "attempts": "int",
}  # fmt: skip


def make_column(values: list[Any], kind: str) -> pd.Series:
    """Make a column of type `kind`. Values of another type become missing values."""
    import pandas as pd

    def fitting(value: Any) -> Any:
        if isinstance(value, str) and kind == "str":
            # A path that is not UTF-8 has characters that Parquet cannot hold.
            return value.encode(errors="replace").decode()
        if isinstance(value, float) and kind == "float":
            return value
        if isinstance(value, int) and kind != "str" and not isinstance(value, bool):
            return value if abs(value) < 2**63 else None
        return None

    dtype = {"str": pd.StringDtype(), "int": pd.Int64Dtype(), "float": pd.Float64Dtype()}[kind]
    return pd.Series([fitting(value) for value in values], dtype=dtype)
