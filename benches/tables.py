"""The tables that the benches print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def times(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, the floor included."""
    rows = dict(record["contenders"])
    if "floor" in record:
        rows = {"viops": rows.pop("viops"), "floor": record["floor"], **rows}
    return rows


def format_seconds(seconds: float) -> str:
    """Three digits in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def format_bytes(count: float) -> str:
    """Three digits in MB."""
    return f"{count / 1e6:.3g} MB"


def format_number(number: float) -> str:
    """Three digits."""
    return f"{number:.3g}"


#: By the unit of a record: how its numbers are written, less of them in a word, and how many.
_UNITS = {
    "seconds": (format_seconds, "faster", "its time"),
    "bytes": (format_bytes, "less", "its memory"),
    "": (format_number, "less", "that"),
}


def format_bar(bar: Mapping[str, Any], unit: str = "seconds") -> str:
    """Such as "at most 1.4 x: met"."""
    words = "at most" if bar["relation"] == "<=" else "at least"
    limit = f"{bar['limit']:.3g} x"
    if bar["against"] == "viops":
        limit = _UNITS[unit][0](bar["limit"])
    return f"{words} {limit}: {'met' if bar['met'] else 'MISSED'}"


def format_record(record: Mapping[str, Any]) -> str:
    """The table of one bench."""
    bars = {bar["against"]: bar for bar in record["bars"]}
    on_gpu = record.get("device", "cpu") != "cpu"
    unit = record.get("unit", "seconds")
    formatted, fewer, times_its = _UNITS[unit]
    rows = [("", "best", "median", "" if on_gpu else "faults", "viops takes", "bar")]
    for name, row in times(record).items():
        bar = format_bar(bars[name], unit) if name in bars else ""
        if "error" in row:
            rows.append((name, "failed", "", "", "", bar))
            continue
        took = ""
        if name != "viops":
            ratio = record["ratios"][name]
            over = name == "floor" or bars.get(name, {}).get("relation") == "<="
            over = over or ratio < 1
            took = f"{1 / ratio:.2f} x {times_its}" if over else f"{ratio:.2f} x {fewer}"
        rows.append(
            (
                name,
                formatted(row["best"]),
                formatted(row["median"]) if "median" in row else "",
                "" if on_gpu else str(row.get("page_faults", "")),
                took,
                bar,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{record['title']}  ({record['rounds']} rounds)"]
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"  {text}" for text in _floor_lines(record)]
    if "what" in record:
        lines.append(f"  {record['what']}")
    elif on_gpu:
        lines.append(f"  {_words_on_calls(record)}")
    else:
        lines.append(f"  malloc: {record['malloc']}")
    lines += [f"  {key}: {text}" for key, text in record["notes"].items()]
    for name, row in record["contenders"].items():
        if "error" in row:
            lines.append(f"  {name} failed: {row['error']}")
    return "\n".join(lines)


def _words_on_calls(record: Mapping[str, Any]) -> str:
    calls, sets = record["calls"], record["input_sets"]
    text = f"{calls} calls a sample, {'replayed as a CUDA graph' if record['graph'] else 'queued'}"
    if sets > 1:
        text += f", on {sets} sets of inputs in turn, {record['input_bytes'] / 1e6:.3g} MB"
    return text


def _floor_lines(record: Mapping[str, Any]) -> list[str]:
    floor = record.get("floor", {})
    lines = []
    if floor.get("bytes"):
        rate = floor["bytes_per_second"] / 1e9
        lines.append(f"floor: {floor['bytes'] / 1e6:.3g} MB at {rate:.3g} GB/s, a copy in this run")
        if not floor.get("flops") and "floor" in record["ratios"]:
            share = record["ratios"]["floor"]
            lines.append(f"viops moves {share * rate:.3g} GB/s, {share:.0%} of what the copy moves")
    if floor.get("flops"):
        rate = floor["flops_per_second"] / 1e9
        lines.append(
            f"floor: {floor['flops'] / 1e9:.3g} GFLOP at {rate:.3g} GFLOP/s, torch.mm in "
            f"{floor.get('dtype', 'float32')} in this run"
        )
    if record["ratios"].get("floor", 0) > 1:
        lines.append(
            "viops is faster than the floor: caches held the data, or torch.mm is below the peak"
        )
    return lines


def format_bars(records: Sequence[Mapping[str, Any]]) -> str:
    """All bars of a run, one a line."""
    lines = []
    for record in records:
        for bar in record["bars"]:
            measured = bar["measured"]
            if measured is None:
                text = "not measured"
            else:
                text = (
                    format_seconds(measured) if bar["against"] == "viops" else f"{measured:.2f} x"
                )
            against = "a call" if bar["against"] == "viops" else bar["against"]
            lines.append(f"{record['title']}, {against}: {text}, {format_bar(bar)}")
    return "\n".join(lines)
