"""The variants of an ablation: the network with single parts changed or left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from btinet.errors import UserError
from btinet.models.network import Directions, Tasks
from btinet_kernels.interaction.reference import Pooling, Signals

FULL = "gated"
SINGLE_TASK = {"segmentation": "iou", "classification": "accuracy"}  # variant → its score in Δm
PAPER_TABLE = ("baseline", "mscf", "tim", "fixed", "tim_upa", FULL)


@dataclass(frozen=True)
class Variant:
    """Options of ``btinet train`` that say what the network has; the defaults are the whole of BTI-Net."""

    interaction: str = "gated"
    multi_scale: bool = True
    directions: Directions = "both"
    signals: Signals = "proxies"
    pool: Pooling = "gap"
    tasks: Tasks = "both"

    def description(self) -> str:
        """The parts it has, in the papers' abbreviations."""
        parts = ["MSCF"] if self.multi_scale else []
        levels = self.interaction.split(",")
        if set(levels) != {"none"}:
            where = [f"d{number}" for number, choice in enumerate(levels, start=1) if choice != "none"]
            at = f" at {', '.join(where)}" if len(where) < len(levels) else ""
            parts.append(("TIM + UPA" if "gated" in levels else "TIM") + at)
        if self.directions != "both":
            parts.append(self.directions.replace("_to_", " → ") + " only")
        if self.signals != "proxies":
            parts.append(f"{self.signals} signals")
        if self.pool != "gap":
            parts.append(f"{self.pool} pooling")
        if self.tasks != "both":
            parts.append(f"{self.tasks} alone")
        return ", ".join(parts) or "none"


def all_variants(levels: int) -> dict[str, Variant]:
    """Every variant by name, in the order of the tables, of a network with so many decoder levels."""
    variants = {
        "baseline": Variant("none", multi_scale=False),
        "mscf": Variant("none"),
        "tim": Variant("fixed", multi_scale=False),
        "fixed": Variant("fixed"),
        "tim_upa": Variant(multi_scale=False),
        FULL: Variant(),
        "seg_to_clf": Variant(directions="seg_to_clf"),
        "clf_to_seg": Variant(directions="clf_to_seg"),
        "softmax_pool": Variant(pool="softmax"),
        "variance_signals": Variant(signals="variance"),
    }
    numbers = range(1, levels + 1)
    if levels > 1:
        variants |= {f"only_d{n}": Variant(_per_level(k == n for k in numbers)) for n in numbers}
    if levels > 2:  # of two, leaving one out is the other alone
        variants |= {f"without_d{n}": Variant(_per_level(k != n for k in numbers)) for n in numbers}
    variants["segmentation"] = Variant("none", tasks="segmentation")
    variants["classification"] = Variant("none", tasks="classification")
    return variants


def choose_variants(names: str | None, table: str | None, levels: int) -> dict[str, Variant]:
    """The variants named in ``names``, separated by commas, or those of the table ``"all"`` or ``"paper"`` (default).

    Raises:
        UserError: both are given, or a name that is unknown or given twice.
    """
    known = all_variants(levels)
    if names is not None and table is not None:
        raise UserError(f"--variants {names}: and --table {table} both say what to compare; leave one of them out.")
    if names is None:
        return known if table == "all" else {name: known[name] for name in PAPER_TABLE}
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise UserError(f"--variants {name!r}: give some of {', '.join(known)}, separated by commas.")
        if chosen.count(name) > 1:
            raise UserError(f"--variants {names}: names {name!r} more than once; name each variant once.")
    return {name: known[name] for name in chosen}


def _per_level(on: Iterable[bool]) -> str:
    return ",".join("gated" if here else "none" for here in on)
