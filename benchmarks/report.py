"""What the benchmark suite found, as JSON, as Markdown tables and as plots."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import harness
from load import Result
from workloads import Workload

BUSY = 0.9  # the share of a core from which on the load may be what was measured
OURS = "roomsock"
FLOOR = "floor"
FLOORS = ("floor epoll", "floor handler")
NATIVE = {"picows": "Cython", "socketify": "C++"}  # servers that are not written in Python
PACKAGES = (
    *("uvicorn", "starlette", "httptools", "hypercorn", "aiohttp", "tornado"),
    *("trio-websocket", "socketify"),
)


class Comparison(NamedTuple):
    """How many times as good as another server, in each round."""

    ratios: list[float]
    by_cpu: bool = False

    @property
    def middle(self) -> float:
        return median(self.ratios)

    def __str__(self) -> str:
        return f"{self.middle:.2f}{'*' * self.by_cpu}" if self.ratios else ""


@dataclass
class Row:
    """All rounds of one workload with one server."""

    workload: Workload
    server: str
    results: list[Result]
    failed: str | None

    @property
    def values(self) -> list[float]:
        return [self.workload.value(result) for result in self.results]

    @property
    def family(self) -> str:
        return self.server.split()[0]

    def ratios(self, base: Row) -> list[float]:
        """How many times as good as another server, in each round."""
        pairs = zip(self.values, base.values, strict=False)  # until one of them failed
        if self.workload.less_is_better:
            return [theirs / own for own, theirs in pairs if own]
        return [own / theirs for own, theirs in pairs if theirs]

    def cpu_ratios(self, base: Row) -> list[float]:
        """The same of the server's processor time for each message."""
        pairs = zip(self.results, base.results, strict=False)
        return [theirs.cpu / own.cpu for own, theirs in pairs if own.cpu]

    def compare(self, base: Row) -> Comparison:
        """What can be said: rates tell nothing about a server when the load was the limit."""
        if not (self.load_is_the_limit() or base.load_is_the_limit()):
            return Comparison(self.ratios(base))
        if self.workload.kind == "latency":
            return Comparison([])
        return Comparison(self.cpu_ratios(base), by_cpu=True)

    def notes(self) -> str:
        notes = []
        if self.failed:
            notes.append(f"**failed: {self.failed}**")
        notes += sorted({result.note for result in self.results if result.note})
        if self.load_is_the_limit():
            notes.append("the load was the limit")
        return "; ".join(notes)

    def load_is_the_limit(self) -> bool:
        if not self.results:
            return False
        if self.workload.kind == "latency":  # it sends at fixed times: only being late limits it
            return median(r.lag for r in self.results) > median(r.p99 for r in self.results) / 2
        return self.workload.kind != "memory" and median(r.load for r in self.results) > BUSY


# JSON


@cache
def machine() -> dict[str, Any]:
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        **harness.machine((*harness.PACKAGES, *PACKAGES)),
        "processor": ", ".join(models),
        "kernel": platform.release(),
        "command": " ".join(["python", *sys.argv]),
    }


def write_json(rows: list[Row], out: Path) -> None:
    found = [
        {
            "workload": asdict(row.workload),
            "server": row.server,
            "failed": row.failed,
            "rounds": [result._asdict() for result in row.results],
        }
        for row in rows
    ]
    text = json.dumps({"machine": machine(), "results": found}, indent=1)
    (out / "results.json").write_text(text + "\n")


def read_json(path: Path) -> tuple[list[Row], dict[str, Any]]:
    data = json.loads(path.read_text())
    rows = [
        Row(
            Workload(**found["workload"]),
            found["server"],
            [Result(**result) for result in found["rounds"]],
            found["failed"],
        )
        for found in data["results"]
    ]
    return rows, data["machine"]


# Tables


def tables(rows: list[Row], base: str, about: dict[str, Any]) -> str:
    """All tables, and before them what was measured, and on what."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    parts = [
        f"Python {about['python']}, {about['processor']} ({about['cores']} cores), "
        f"Linux {about['kernel']}, load average {about['load']} before.\n{versions}.\n"
        f"`{about['command']}`"
    ]
    servers = list(dict.fromkeys(row.server for row in rows))
    own = [server for server in servers if server.startswith(OURS)]
    parts += [_summary(rows, server) for server in own]
    parts += [_against(rows, server, servers) for server in own]
    workloads = dict.fromkeys(row.workload for row in rows)
    parts += [_table([row for row in rows if row.workload == w], base) for w in workloads]
    return "\n\n".join(parts) + "\n"


def _summary(rows: list[Row], ours: str) -> str:
    """One of ours in every workload, and how it compares with the best of each kind of peer."""
    kinds = {
        "best peer": lambda row: True,
        "best in Python": lambda row: row.family not in NATIVE,
        "best on trio": lambda row: row.server.endswith(" trio"),
    }
    if not ours.endswith(" trio"):
        del kinds["best on trio"]
    alone = [name for name in (*FLOORS, f"{OURS} asyncio") if name != ours]
    lines = [
        f"**{ours}, how many times as good as the best**",
        "",
        f"| | {ours} | " + " | ".join((*kinds, *alone)) + " |",
        "| --- | --: |" + " --- |" * len(kinds) + " --: |" * len(alone),
    ]
    for row in rows:
        if row.server != ours or not row.results:
            continue
        found = [
            (other, comparison)
            for other in rows
            if other.workload == row.workload and (comparison := row.compare(other)).ratios
        ]
        peers = [pair for pair in found if pair[0].family not in (OURS, FLOOR)]
        cells = [f"{short(median(row.values))} {row.workload.short_unit}"]
        for is_one in kinds.values():
            some = [(c.middle, f"{c} {other.server}") for other, c in peers if is_one(other)]
            cells.append(min(some, default=(0, ""))[1])
        by_name = {other.server: str(comparison) for other, comparison in found}
        cells += [by_name.get(name, "") for name in alone]
        lines.append(f"| {_full_title(row.workload)} | " + " | ".join(cells) + " |")
    native = " and ".join(f"{name} ({language})" for name, language in NATIVE.items())
    lines += ["", f"In Python: all but {native}, whatever parts of the others are in C."]
    return "\n".join(_explained(lines))


def _against(rows: list[Row], ours: str, servers: list[str]) -> str:
    """One of ours against each other server: how many times as good, in every workload."""
    others = [server for server in servers if server.partition(" ")[0] != OURS]
    found = {(row.workload, row.server): row for row in rows}
    lines = [
        f"**{ours}, how many times as good as**",
        "",
        "| | " + " | ".join(others) + " |",
        "| --- |" + " --: |" * len(others),
    ]
    for workload in dict.fromkeys(row.workload for row in rows):
        own = found.get((workload, ours))
        if own is not None:
            pairs = [found.get((workload, other)) for other in others]
            cells = [str(own.compare(other)) if other else "" for other in pairs]
            lines.append(f"| {_full_title(workload)} | " + " | ".join(cells) + " |")
    return "\n".join(_explained(lines))


def _explained(lines: list[str]) -> list[str]:
    if not any("* " in line for line in lines[4:]):
        return lines
    return [*lines, "", f"\\{AS_CPU}."]


AS_CPU = "*: the load was the limit, so server CPU time for each message is compared"


def _full_title(workload: Workload) -> str:
    return {"latency": "p99 latency, ", "memory": "memory, "}.get(
        workload.kind, ""
    ) + workload.title


def _table(rows: list[Row], base: str) -> str:
    workload = rows[0].workload
    base_row = next((row for row in rows if row.server == base), None)
    latency = workload.kind == "latency"
    lines = [
        f"**{_full_title(workload)}: {workload.unit}**",
        "",
        f"| server | median | min | max | to {base} | CPU us each | CPU to {base} "
        "| server busy | load busy |"
        + (" p50 | p99.9 | sent per second |" if latency else "")
        + " |",
        "| --- |" + " --: |" * (11 if latency else 8) + " --- |",
    ]
    for row in rows:
        if not row.results:
            lines.append(f"| {row.server} |" + " |" * (11 if latency else 8) + f" {row.notes()} |")
            continue
        results, values = row.results, row.values
        ratios = row.ratios(base_row) if base_row else []
        by_cpu = row.cpu_ratios(base_row) if base_row else []
        cells = [
            *(short(value) for value in (median(values), min(values), max(values))),
            f"{median(ratios):.2f}x" if ratios else "",
            f"{median(r.cpu for r in results) * 1e6:.1f}",
            f"{median(by_cpu):.2f}x" if by_cpu else "",
            f"{median(r.server for r in results):.0%}",
            "" if latency else f"{median(r.load for r in results):.0%}",
        ]
        if latency:
            cells += [short(median(r.p50 for r in results) * 1000)]
            cells += [short(median(r.p999 for r in results) * 1000)]
            cells += [short(median(r.rate for r in results))]
        lines.append(f"| {row.server} | " + " | ".join(cells) + f" | {row.notes()} |")
    return "\n".join(lines)


def short(value: float) -> str:
    """A figure with about three digits."""
    for limit, divisor, unit in ((999_500, 1e6, "M"), (9_999.5, 1e3, "k")):
        if value >= limit:
            value /= divisor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


# Plots

BLUES = {
    "roomsock asyncio": "#1f5fa8",
    "roomsock uvloop": "#4f94d8",
    "roomsock trio": "#0b2f5b",
    "roomsock asyncio-pure": "#a9c8ea",
}
COLOURS = {"picows": "#d9822b", "socketify": "#5b8c3a", "websockets": "#8a8a8a"}
OTHERS = "#c4c4c4"


def plots(rows: list[Row], base: str, out: Path) -> None:
    """Write overview, rates and latencies as SVG and PNG, if matplotlib is there."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "svg.hashsalt": "roomsock",
        }
    )
    for name, draw in (("overview", _overview), ("rates", _rates), ("latency", _latencies)):
        figure = draw([row for row in rows if row.results], base)
        if figure is not None:
            for ending in ("svg", "png"):
                figure.savefig(out / f"{name}.{ending}", dpi=150, bbox_inches="tight")


def colour(row: Row) -> str:
    if row.family == OURS:
        return BLUES[row.server]
    return COLOURS.get(row.family, OTHERS)


def best_of_each(rows: list[Row], base: Row | None = None) -> list[Row]:
    """All of ours, and of every other family the best (compared with a base), best first."""

    def good(row: Row) -> float:
        if base is not None:
            return row.compare(base).middle
        return median(row.values) * (-1 if row.workload.less_is_better else 1)

    comparable = [row for row in rows if base is None or row.compare(base).ratios]
    best: dict[str, Row] = {}
    for row in sorted(comparable, key=good, reverse=True):
        best.setdefault(row.server if row.family == OURS else row.family, row)
    return list(best.values())


def _by_workload(rows: list[Row], base: str) -> dict[Workload, tuple[Row, list[Row]]]:
    """The base and the others of each workload in which the base can be compared."""
    found: dict[Workload, list[Row]] = {}
    for row in rows:
        found.setdefault(row.workload, []).append(row)
    bases = {row.workload: row for row in rows if row.server == base}
    return {
        workload: (bases[workload], some)
        for workload, some in found.items()
        if workload in bases and bases[workload].compare(bases[workload]).ratios
    }


def _ratio_axis(axes: Any, base: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)


def _overview(rows: list[Row], base: str) -> Any:
    """Every workload a line, every server a dot."""
    import matplotlib.pyplot as plt

    found = _by_workload(rows, base)
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(8.5, 0.36 * len(found) + 1.2))
    seen = set()
    for line, (base_row, some) in enumerate(found.values()):
        for row in some:
            comparison = row.compare(base_row)
            if not comparison.ratios:
                continue
            label = row.server if row.family == OURS else row.family
            named = row.family in (OURS, FLOOR) or row.family in COLOURS
            label = label if named else "other Python servers"
            floor = row.family == FLOOR
            axes.plot(
                comparison.middle,
                line,
                "|" if floor else "o",
                color="#444444" if floor else colour(row),
                markersize=11 if floor else 8 if row.family == OURS else 6,
                markeredgecolor="#444444" if floor else "white",
                markeredgewidth=1.4 if floor else 0.6,
                zorder=3 if row.family == OURS else 2,
                linestyle="none",
                label=None if label in seen else label,
            )
            seen.add(label)
            if comparison.by_cpu:
                axes.annotate(
                    "*", (comparison.middle, line), (4, 1), textcoords="offset points", fontsize=8
                )
    _ratio_axis(axes, base)
    axes.set_yticks(range(len(found)), list(map(_full_title, found)))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="both", color="#eeeeee", linewidth=0.8)
    axes.set_xlabel(f"times as good as {base}: right is better\n{AS_CPU}")
    axes.spines["left"].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _rates(rows: list[Row], base: str) -> Any:
    """A panel of ratio bars for each workload; of each peer its fastest variant."""
    import matplotlib.pyplot as plt

    found = {
        workload: (base_row, best_of_each(some, base_row))
        for workload, (base_row, some) in _by_workload(rows, base).items()
        if workload.kind != "latency"
    }
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    most = max(len(shown) for _, shown in found.values())
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.6 * columns, (0.21 * most + 0.8) * lines), squeeze=False
    )
    for panel in panels.flat[len(found) :]:
        panel.set_visible(False)
    for axes, (workload, (base_row, shown)) in zip(panels.flat, found.items(), strict=False):
        _bars(axes, workload, base_row, shown)
        _ratio_axis(axes, base)
        axes.margins(x=0.18)
    figure.supxlabel(f"times as good as {base}; whiskers: all rounds\n{AS_CPU}", fontsize=9)
    figure.tight_layout(h_pad=1.2)
    return figure


def _bars(axes: Any, workload: Workload, base_row: Row, rows: list[Row]) -> None:
    for line, row in enumerate(rows):
        ratios, by_cpu = row.compare(base_row)
        middle = median(ratios)
        floor = row.family == FLOOR
        axes.barh(
            line,
            middle - 1,
            left=1,
            height=0.72,
            color="white" if floor else colour(row),
            edgecolor="#444444" if floor else "none",
            hatch="////" if floor else None,
            linewidth=0.6,
        )
        axes.plot([min(ratios), max(ratios)], [line, line], color="#222222", linewidth=0.8)
        right = middle >= 1
        axes.annotate(
            short(median(row.values)) + "*" * by_cpu,
            (max(ratios) if right else min(ratios), line),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), [row.server for row in rows], fontsize=7.5)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.family == OURS else "normal")
    axes.invert_yaxis()
    axes.set_title(f"{_full_title(workload)} ({workload.unit})")


def _latencies(rows: list[Row], _base: str) -> Any:
    """Median to 99.9th percentile of each server, the 99th as a dot."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    workloads = list(dict.fromkeys(row.workload for row in rows if row.workload.kind == "latency"))
    if not workloads:
        return None
    some = {w: best_of_each([row for row in rows if row.workload == w]) for w in workloads}
    height = 0.24 * max(map(len, some.values())) + 1
    figure, panels = plt.subplots(
        1, len(workloads), figsize=(4.8 * len(workloads), height), squeeze=False
    )
    for axes, (workload, shown) in zip(panels.flat, some.items(), strict=True):
        for line, row in enumerate(shown):
            p50, p99, p999 = (
                median(getattr(result, name) for result in row.results) * 1000
                for name in ("p50", "p99", "p999")
            )
            own = colour(row) if row.family != FLOOR else "#444444"
            axes.plot([p50, p999], [line, line], color=own, linewidth=2.2, solid_capstyle="butt")
            axes.plot([p99], [line], "o", color=own, markersize=5)
            rate = short(median(result.rate for result in row.results))
            axes.annotate(
                f"{rate}/s",
                (p999, line),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_yticks(range(len(shown)), [row.server for row in shown], fontsize=7.5)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(workload.title)
        axes.set_xlabel("ms at half load: median, 99 % (dot), 99.9 %")
    figure.tight_layout()
    return figure
