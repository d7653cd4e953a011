"""Where the results of the benchmarks are, and the tables that are made of them.

    python benchmarks/results.py path      prints the results file of this machine
    python benchmarks/results.py write     writes results/<device>.md of each results/<device>.json, and README's table
    python benchmarks/results.py check     exits with 1 where one of these is not what `write` would write

Speed-up is stock's time over ours, the median over rounds in which both ran in turn: below 1 we are slower.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = ("<!-- results -->\n", "<!-- /results -->\n")
BASELINES = {
    "finetune": ("stock", "transformers + PEFT + torch.optim.AdamW(fused=True)"),
    "lora_linear": ("peft", "PEFT's layer"),
    "dora_linear": ("peft", "PEFT's layer with DoRA"),
    "flash_attention": ("stock", "torch's scaled_dot_product_attention"),
    "adamw": ("fused", "torch.optim.AdamW(fused=True)"),
    "adamw_forms": ("float32_states", "fusetune.AdamW(state_dtype=float32)"),
    "dequantize": ("bitsandbytes", "bitsandbytes"),
}
PEERS = ("flash_attention", "efficient_attention", "cudnn_attention", "math", "flex", "flash_attn")

Row = dict[str, Any]


def device_name() -> str:
    import torch

    from fusetune import _native

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads, {_native.extension().isa()}"


def path(device: str) -> Path:
    return HERE / "results" / (re.sub(r"\W+", "-", device.lower()).strip("-") + ".json")


def table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def speedup(row: Row) -> float:
    return float(row[f"speedup_over_{BASELINES[row['op']][0]}"])


def stock_ms(row: Row) -> float:
    return float(row[f"{BASELINES[row['op']][0]}_ms"])


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def machine(results: Row) -> str:
    info = results["machine_info"]
    gemm = ", ".join(f"{dtype} {rate:,g}" for dtype, rate in info["gemm_gflops"].items())
    return (
        f"{info['device']}; torch {info['torch']}, Python {info['python']}. Its ceilings, as torch reaches them:"
        f" matrix products {gemm} GFLOP/s, stream {info['stream_gbs']} GB/s."
    )


def steps_table(rows: list[Row]) -> str:
    """Whole training steps; what both compute stands beside how long they take."""
    return table(
        ["training step", "stock", "fusetune", "speed-up", "tokens/s", "MFU", "loss (stock)", "gradient norm (stock)"],
        (
            [
                f"{row['model']}, {row['method']}, {row['shape']}"
                + (f", lengths from {float(row['mask']):.0%} of S" if row["mask"] != "1" else "")
                + f", {row['dtype']}",
                milliseconds(row["stock_ms"]),
                milliseconds(row["ours_ms"]),
                f"**{speedup(row):.2f}×**",
                f"{row['tokens_per_second']:,}",
                f"{row['mfu']:.0%}",
                f"{row['fusetune_loss']:.7g} ({row['stock_loss']:.7g})",
                f"{row['fusetune_grad_norm']:.6g} ({row['stock_grad_norm']:.6g})",
            ]
            for row in rows
        ),
    )


def ops_table(rows: list[Row]) -> str:
    """A line for each op, dtype and whether there is dropout or clipping."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["op"] != "adamw_forms":  # which are against ourselves
            extra = ", dropout 0.1" if row.get("dropout_p") else ", clipped" if row.get("clipped") else ""
            groups.setdefault((row["op"], row["dtype"], extra), []).append(speedup(row))
    return table(
        ["op", "dtype", "cells", "speed-up: least", "median", "most", "slower cells"],
        (
            [
                f"{op}{extra} over {'clip_grad_norm_ and ' * (extra == ', clipped')}{BASELINES[op][1]}",
                dtype,
                len(found),
                *(f"{value:.2f}×" for value in (min(found), statistics.median(found), max(found))),
                sum(value < 1 for value in found),
            ]
            for (op, dtype, extra), found in groups.items()
        ),
    )


def tax_table(rows: list[Row]) -> str:
    """What LoRA adds to the time of frozen layers, without and with dropout. Not where torch emulates their products,
    so that ours is faster."""
    layers: dict[tuple[str, str], dict[float, Row]] = {}
    for row in rows:
        if row.get("lora_tax", -1) > -0.5 and "backend" not in row:
            layers.setdefault((row["shape"], row["dtype"]), {})[row["dropout_p"]] = row

    def taxes(row: Row) -> list[str]:
        cells = [f"{row[name]:+.1%}" if name in row else "" for name in ("peft_tax", "peft_compiled_tax")]
        return [
            *cells,
            f"**{row['lora_tax']:+.1%}**",
            f"{row['peft_saved_bytes'] / 1e6:.3g} → {row['saved_bytes'] / 1e6:.3g} MB",
        ]

    heads = ["PEFT", "compiled", "fusetune", "saved for backward"]
    return table(
        ["LoRA over frozen, M×K×N", "dtype", "floor", *heads, *(f"{head}, dropout 0.1" for head in heads)],
        (
            [shape, dtype, f"{found[0.0]['floor']:+.1%}", *taxes(found[0.0]), *taxes(found[0.1])]
            for (shape, dtype), found in layers.items()
        ),
    )


def cells_table(rows: list[Row]) -> str:
    return table(
        ["op", "cell", "stock", "fusetune", "speed-up", "beside"],
        (
            [
                row["op"],
                ", ".join(
                    str(row[name])
                    for name in ("shape", "form", "mask", "dtype", "dropout_p", "backend")
                    if row.get(name) not in (None, 0.0)
                )
                + (f", clipped to a norm of {row['clipped']}" if "clipped" in row else ""),
                milliseconds(stock_ms(row)),
                milliseconds(row["ours_ms"]),
                f"{speedup(row):.2f}×",
                "; ".join(beside(row)),
            ]
            for row in rows
        ),
    )


def beside(row: Row) -> list[str]:
    """What else the row says: its share of a ceiling, in the terms of the op."""
    said = []
    if "lora_tax" in row:
        said.append(f"tax {row['lora_tax']:+.1%}, PEFT's {row['peft_tax']:+.1%}, floor {row['floor']:+.1%}")
    if "dora_over_lora" in row:
        said.append(f"{row['dora_over_lora']:.2f}× the time of LoRA")
    if "gflops" in row:
        said.append(f"{row['gflops']:,} GFLOP/s")
    if "share" in row:
        said.append(f"{row['share']:.0%} of a product's rate, stock {row['stock_share']:.0%}")
    if "forward_ms" in row:
        said.append(f"forward {milliseconds(row['forward_ms'])}, stock {milliseconds(row['stock_forward_ms'])}")
    if "dropout_cost" in row:
        said.append(f"{row['dropout_cost']:+.0%} over no dropout")
    if "over_real_tokens" in row:
        said.append(f"{row['over_real_tokens']:.2f}× the real tokens' share of unpadded time")
    if "saved_mb" in row:
        said.append(f"{row['saved_mb']:.3g} MB saved for backward, stock {row['stock_saved_mb']:.3g}")
    peers = [name for name in PEERS if f"speedup_over_{name}" in row]
    said += [f"{row[f'speedup_over_{name}']:.2f}× {name.replace('_', ' ')}" for name in peers]
    if "gbs" in row:
        said.append(
            f"{row['gbs']} GB/s, {row['stream_share']:.0%} of the stream"
            if "stream_share" in row
            else f"{row['gbs']} GB/s"
        )
    if "grad_norm" in row:
        said.append(f"gradient norm {row['grad_norm']:.7g} (stock {row['stock_grad_norm']:.7g})")
    if "speedup_over_bitsandbytes" in row and row["op"] == "adamw_forms":
        said.append(f"{row['speedup_over_bitsandbytes']:.1f}× bitsandbytes' AdamW8bit")
    if "speedup_over_foreach" in row:
        said.append(f"{row['speedup_over_foreach']:.1f}× torch's foreach")
    if "speedup_over_default" in row:
        said.append(f"{row['speedup_over_default']:.1f}× torch's default")
    return said


def documents() -> dict[Path, str]:
    """Every generated document and what it must hold."""
    found = {}
    first_screen = []
    for file in sorted((HERE / "results").glob("*.json"), reverse=True):  # the larger instruction sets first
        results = json.loads(file.read_text())
        rows = results["benchmarks"]
        steps, cells = [r for r in rows if r["op"] == "finetune"], [r for r in rows if r["op"] != "finetune"]
        taxed = [row for row in cells if "lora_tax" in row]
        tables = ((steps_table, steps), (ops_table, cells), (tax_table, taxed))
        said, summary = machine(results), "\n".join(make(rows) for make, rows in tables if rows)
        where = f"[All cells](benchmarks/results/{file.stem}.md); `make bench` measures your machine."
        first_screen.append(f"{said} {where}\n\n{summary}")
        title = f"# {results['machine_info']['device']}"
        origin = f"Made by `benchmarks/results.py` of `{file.name}`. {said}"
        found[file.with_suffix(".md")] = "\n\n".join([title, origin, f"{summary}\n## Cells", cells_table(cells)])
    before, rest = README.read_text().split(MARKS[0])
    found[README] = before + MARKS[0] + "\n" + "\n".join(first_screen) + "\n" + MARKS[1] + rest.split(MARKS[1])[1]
    return found


def draw() -> None:
    """results/<device>-attention.png of each machine: attention's share of the product rate by length of sequence."""
    import matplotlib.pyplot as plt

    for file in (HERE / "results").glob("*.json"):
        results = json.loads(file.read_text())
        rows = [row for row in results["benchmarks"] if row.get("sweep")]
        if not rows:
            continue
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for mask, style in (("full", "-"), ("causal", "--")):
            for D in sorted({int(row["shape"].split("D=")[1]) for row in rows}):
                line = [row for row in rows if row["mask"] == mask and row["shape"].endswith(f"D={D}")]
                lengths = [int(re.search(r" S=(\d+)", row["shape"])[1]) for row in line]  # type: ignore[index]
                for name, key, marker in (("fusetune", "share", "o"), ("torch", "stock_share", "x")):
                    label = f"{name}, {mask}, D={D}"
                    axes.plot(lengths, [100 * row[key] for row in line], style, marker=marker, label=label)
        axes.set(xscale="log", xlabel="length of a sequence", ylabel="% of the product rate", ylim=(0, 100))
        axes.set_xticks(lengths, map(str, lengths))
        axes.minorticks_off()
        axes.set_title(f"Attention, forward and backward, bfloat16\n{results['machine_info']['device']}", fontsize=9)
        axes.legend(fontsize=8)
        figure.savefig(file.with_name(f"{file.stem}-attention.png"), dpi=110)
        plt.close(figure)


def main(command: str) -> int:
    if command == "path":
        print(path(device_name()))
    elif command == "write":
        for file, text in documents().items():
            file.write_text(text)
        draw()
    elif command == "check":
        stale = [file.name for file, text in documents().items() if not file.exists() or file.read_text() != text]
        if stale:
            print(f"{', '.join(stale)} must be written anew: python benchmarks/results.py write", file=sys.stderr)
            return 1
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
