"""The radix lab's rows (radix_lab.json, as a pandas frame) as a table, as ratios and as radix_lab.png."""

from pathlib import Path

KEYS = ["workload", "radix_cache", "pool", "eviction", "policy"]
COLOURS = {"fcfs": "C0", "dfs-weight": "C4", "lpm": "C1", "planned": "C2"}
# What the pool holds, and the bar's shade.
POOLS = {"longest": ("one request", 0.4), "half": ("half", 0.7), "all": ("everything", 1)}


def split(frame):
    """(rows of random arrival orders, rows of the interleaved one)"""
    interleaved = frame.arrival_order == "interleaved"
    return frame[~interleaved], frame[interleaved]


def print_table(frame) -> None:
    """One line per workload and setting: means over the random arrival orders, range and interleaved order too."""
    random_orders, interleaved = (part.groupby(KEYS) for part in split(frame))
    table = random_orders[["hit_rate", "prefill_tokens", "ttft_p50_s", "output_tokens_per_s"]].mean()
    table.insert(1, "min", random_orders.hit_rate.min())
    table.insert(2, "max", random_orders.hit_rate.max())
    table.insert(3, "interleaved", interleaved.hit_rate.mean())
    table.insert(4, "optimum", interleaved.optimum_hit_rate.mean())
    formats = dict.fromkeys(table.columns, "{:,.0f}".format) | {"ttft_p50_s": "{:.3f}".format}
    formats |= dict.fromkeys(table.columns[:5], "{:.1%}".format)
    print(table.reset_index().to_string(index=False, formatters=formats))


def on_against_off(frame) -> dict[str, dict[str, float]]:
    """Per workload, where everything fits: the radix cache with planned order against no radix cache."""
    rows, _ = split(frame)
    measured = ["output_tokens_per_s", "ttft_p50_s"]
    off = rows[~rows.radix_cache].groupby("workload")[measured].mean()
    on = rows[(rows.policy == "planned") & (rows.pool == "all")].groupby("workload")[measured].mean()
    ratios = (on / off).dropna().set_axis(["throughput_ratio", "ttft_ratio"], axis=1)
    return ratios.to_dict("index")


def plot(frame, folder: Path) -> None:
    """radix_lab.png: a panel per question, a group of bars per workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = frame[frame.eviction == "lru"]
    small = {name: (f"pool == 'longest' and policy == '{name}'", colour) for name, colour in COLOURS.items()}
    pools = {
        f"{policy}, {holds}": (
            f"radix_cache and policy == '{policy}' and pool == '{pool}'",
            (COLOURS[policy], shade),
        )
        for policy in ("fcfs", "planned")
        for pool, (holds, shade) in POOLS.items()
    }
    cache = {"radix cache off": ("not radix_cache", "0.6"), "on, fcfs": pools["fcfs, everything"]}
    cache["on, planned"] = pools["planned, everything"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    draw_bars(axes[0], "hit rate by policy, the KV pool holds one request", "hit_rate", small, frame)
    draw_bars(axes[1], "hit rate by what the KV pool holds", "hit_rate", pools, frame)
    title = "median time to first token [s], and prefill tokens"
    draw_bars(axes[2], title, "ttft_p50_s", cache, frame)
    figure.suptitle(
        f"Bars: mean of {frame.arrival_order.nunique() - 1} random arrival orders, whiskers their range; triangles: "
        "interleaved arrival; dashed: the best any order can reach"
    )
    figure.savefig(folder / "radix_lab.png", dpi=110)
    plt.close(figure)


def draw_bars(axis, title: str, column: str, bars: dict[str, tuple], frame) -> None:
    """A group for each workload, in it a bar of `column` for each of `bars`: label -> (pandas query, colour)."""
    names = frame.workload.unique()
    found = [
        (label, rows, colour) for label, (query, colour) in bars.items() if len(rows := frame.query(query))
    ]
    width = 0.8 / max(1, len(found))  # a shorter grid may have none
    for number, (label, rows, colour) in enumerate(found):
        at = [place + (number - (len(found) - 1) / 2) * width for place in range(len(names))]
        random_orders, interleaved = (part.groupby("workload") for part in split(rows))
        low, mean, high = (random_orders[column].agg(name).reindex(names) for name in ("min", "mean", "max"))
        reach = [(mean - low).clip(0), (high - mean).clip(0)]  # a mean of equal numbers may be off by a bit
        axis.bar(at, mean, width, label=label, color=colour, yerr=reach, ecolor="#555555", capsize=2)
        if column == "hit_rate":
            axis.plot(at, interleaved[column].mean().reindex(names), "kv", markersize=4)
            continue
        tokens = random_orders.prefill_tokens.mean().reindex(names)
        for x, y, count in zip(at, high, tokens, strict=True):
            axis.text(x, y, f"  {count:,.0f}", rotation=90, fontsize=7, ha="center", va="bottom")
    if column == "hit_rate":
        bounds = frame.groupby("workload").optimum_hit_rate.max().reindex(names)
        places = [place - 0.45 for place in range(len(names))], [place + 0.45 for place in range(len(names))]
        axis.hlines(bounds, *places, colors="C3", linestyles="--", zorder=3)
        axis.set_ylim(0, 1.02)
    axis.margins(y=0.15)
    axis.set_xticks(range(len(names)), names)
    axis.set_title(title)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": 2 if len(found) > 4 else 4}
    axis.legend(fontsize=8, frameon=False, **below)
