"""The summary of a quantizer as data and as a table; knows no framework."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_HEADINGS = {"quant_type": "quantized", "observed_range": "range", "clipped": "clipped", "sqnr": "SQNR", "status": ""}


@dataclass(frozen=True)
class SummaryRow:
    """One tensor that is quantized, or one layer with weights of which nothing is.

    Attributes:
        name: the layer's name.
        op_type: its class name.
        quant_type: 'weight', 'input', 'output' or 'gradient'; '-' where nothing is quantized.
        bits: the width of the grid; None where nothing is quantized.
        dtype: 'uint' or 'int', or '' where the quantizer has one fixed grid.
        scheme: as in the configuration, or ''.
        observed_range: (least, greatest) over the channels: of the observed range, or of the weight. None if unknown.
        clipped: the share of elements outside the grid; None unless it was measured.
        sqnr: signal to quantization noise ratio in dB: of the weight, and of inputs and outputs where it was measured.
        status: 'quantized', or why not, or not yet.
    """

    name: str
    op_type: str
    quant_type: str
    bits: int | None = None
    dtype: str = ""
    scheme: str = ""
    observed_range: tuple[float, float] | None = None
    clipped: float | None = None
    sqnr: float | None = None
    status: str = "quantized"


@dataclass(frozen=True)
class Summary(Sequence[SummaryRow]):
    """The rows, which it is a sequence of, and what is to be said of the configuration. Its text is a table.

    Attributes:
        rows: in the model's order.
        notes: sentences about entries that decide less than they seem to, and about what each batch norm and smooth
            activation runs with.
    """

    rows: tuple[SummaryRow, ...]
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, index: Any) -> Any:
        """The row, or rows."""
        return self.rows[index]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[SummaryRow]:
        """The rows."""
        return iter(self.rows)

    def __str__(self) -> str:
        """The table and the notes."""
        headings = [_HEADINGS.get(column.name, column.name) for column in fields(SummaryRow)]
        lines = [headings, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
        shown = [i for i in range(len(headings)) if any(line[i] for line in lines[1:])]
        text = ["  ".join(line[i].ljust(widths[i]) for i in shown).rstrip() for line in lines]
        return "\n".join([*text, *self.notes])


def _cells(row: SummaryRow) -> list[str]:
    return [
        row.name or "(model)",
        row.op_type,
        row.quant_type,
        "" if row.bits is None else str(row.bits),
        row.dtype,
        row.scheme,
        "" if row.observed_range is None else "{:.4g} .. {:.4g}".format(*row.observed_range),
        "" if row.clipped is None else f"{row.clipped:.2%}",
        "" if row.sqnr is None else f"{row.sqnr:.1f} dB",
        row.status,
    ]
