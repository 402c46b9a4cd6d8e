"""The headline numbers of a run in the terminal: 100 columns, plain text where the output is no terminal.

Called by the CLI.
"""

from collections.abc import Callable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from services.report_views import fixed, full_width_fvu, numbers_of, omitted_sentences, percent, whole
from storage.records import Json

_WIDTH = 100
_SHORT_VARIANTS = {
    "batch_topk": "BatchTopK",
    "matryoshka_batch_topk": "Matryoshka",
    "matryoshka_batch_topk_random_prefixes": "random pfx",
}


def print_report(report: Json, console: Console) -> None:
    """Print the table of `services.report.build_report`'s JSON, what its columns mean, and why any score is missing."""
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH, color_system=None)
    console.print(headline_table(report))
    console.print(_legend(report), highlight=False)
    for sentence in omitted_sentences(report):
        console.print(f"Omitted: {sentence}", highlight=False, markup=False)


def headline_table(report: Json) -> Table:
    """One row per SAE, then what the same probes and erasures reach without one."""
    ks, ns = numbers_of(report, "sparse_probing"), _ends(numbers_of(report, "tpp"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("SAE", overflow="fold", max_width=20)
    table.add_column("variant", no_wrap=True)
    for heading in ("latents", "L0", "CE", "KL", "FVU", "dead"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"probe k={','.join(ks)}", justify="right", no_wrap=True)
    table.add_column(f"TPP n={','.join(ns)}", justify="right", no_wrap=True)
    for row in report["saes"]:
        table.add_row(
            row["name"],
            _SHORT_VARIANTS.get(row["variant"], row["variant"]),
            whole(row["d_latent"]),
            fixed(1)(row["l0"]),
            percent(row["ce_recovered"]),
            percent(row["kl_recovered"]),
            fixed(3)(full_width_fvu(row, row["d_latent"])),
            percent(row["dead_share"]),
            _joined(row["sparse_probing"], ks),
            _joined(row["tpp"], ns),
        )
    _add_baselines(table, report, ks, ns)
    return table


def _add_baselines(table: Table, report: Json, ks: list[str], ns: list[str]) -> None:
    base = report["baselines"]
    if base is None or not ks:
        return
    residual, empty = base["residual_stream"], [""] * 7
    dense = dict.fromkeys(ks, base["dense_probe"])
    table.add_section()
    table.add_row(
        "residual channels", *empty, _joined(residual["sparse_probing"], ks), _joined(residual["tpp"], ns), style="dim"
    )
    table.add_row(
        "random directions", *empty, _joined(base["random_directions"]["sparse_probing"], ks), "", style="dim"
    )
    table.add_row("dense probe", *empty, _joined(dense, ks), "", style="dim")


def _legend(report: Json) -> str:
    """What the columns mean, and the samples behind them."""
    tokens = max(
        (samples["fidelity"]["num_tokens"] for samples in report["samples"].values() if samples["fidelity"]), default=0
    )
    return (
        f"On {tokens:,} held-out tokens. L0: active latents per token. CE, KL: share recovered of what zero ablation "
        "costs. FVU: variance unexplained at full width. dead: latents that never fired. probe: mean balanced accuracy "
        "reading k latents. TPP: accuracy lost on a concept, less that on others, erasing n latents."
    )


def _ends(numbers: list[str]) -> list[str]:
    """The smallest and the largest: what fits in the line."""
    return list(dict.fromkeys(numbers[:1] + numbers[-1:]))


def _joined(scores: Mapping[str, float] | None, numbers: list[str]) -> str:
    show: Callable[[float | None], str] = fixed(2)
    return " ".join(show((scores or {}).get(number)) for number in numbers)
