"""The manifest: a row per slide, its columns, and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Columns of the manifest, and what they hold.
MANIFEST = {
    "key": "str", "name": "str", "status": "str", "patches": "int", "edge": "int", "pen": "int",
    "blur": "int", "corrupt": "int", "grid": "int", "tissue": "int", "encoders": "str",
    "width": "int", "height": "int", "mpp": "float", "mpp_source": "str", "footprint_px": "float",
    "vendor": "str", "reader": "str", "path": "str", "bytes": "int", "quick_hash": "str",
    "reason": "str", "message": "str", "attempts": "int",
}  # fmt: skip


def table_column(values: list[Any], kind: str) -> pd.Series:
    """Return a column; what is of another kind than it says is missing."""
    import pandas as pd

    def fitting(value: Any) -> Any:
        if isinstance(value, str) and kind == "str":
            # A path that is not UTF-8 has characters that no table can hold.
            return value.encode(errors="replace").decode()
        if isinstance(value, float) and kind == "float":
            return value
        if isinstance(value, int) and kind != "str" and not isinstance(value, bool):
            return value if abs(value) < 2**63 else None
        return None

    dtype = {"str": pd.StringDtype(), "int": pd.Int64Dtype(), "float": pd.Float64Dtype()}[kind]
    return pd.Series([fitting(value) for value in values], dtype=dtype)
