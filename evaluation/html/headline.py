"""The headline of a report: what was done, and the few figures that say what came of it."""

from dataclasses import dataclass

from paredown.evaluation.report import recipe_words, shape_words
from paredown.evaluation.schema import Report
from paredown.evaluation.tables import bytes_text, number, plus_minus, share, text_name

TASKS_SHOWN = 3  # tiles of tasks; the table holds them all


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    name: str
    change: str
    pair: str
    note: str = ""


def recipe_name(report: Report) -> str:
    """Of a recipe without a name, its method."""
    return str(report["recipe"].get("name") or report["recipe"].get("method") or "compressed")


def lead_words(report: Report) -> str:
    """One or two sentences: what was done, and what came of it."""
    counts = report["parameters"]
    words = [
        f"Compressed by {recipe_words(report['recipe'])}: {share(counts['kept'], counts['targeted'])} of the "
        f"{counts['targeted']:,} targeted parameters stay, and the weights are {smaller_words(report)} on disk."
    ]
    words += [f"What was removed: {shape_words(report)}."] if "structure" in report else []
    return " ".join(words)


def smaller_words(report: Report) -> str:
    """`37.1% smaller`, or that it is not."""
    before, after = report["bytes"]["before"], report["bytes"]["after"]
    return f"{1 - after / before:.1%} smaller" if after < before else "no smaller"


def headline_tiles(report: Report) -> list[Tile]:
    """Size, then perplexity by text, then the first tasks."""
    size = report["bytes"]
    tiles = [
        Tile(
            "weights on disk",
            smaller_words(report),
            f"{bytes_text(size['before'])} → {bytes_text(size['after'])}",
        )
    ]
    for entry in report["evaluation"]:
        before, after, delta = entry["before"], entry["after"], entry["paired_delta"]
        tiles.append(
            Tile(
                f"perplexity, {text_name(entry)}",
                f"× {after['token_perplexity'] / before['token_perplexity']:.3f}",
                f"{plus_minus(before['token_perplexity'], before['stderr'])} → "
                f"{plus_minus(after['token_perplexity'], after['stderr'])}",
                f"log ratio {plus_minus(delta['log_ratio'], delta['stderr'], signed=True)}, paired",
            )
        )
    for entry in [e for e in report["evaluation"] if "divergence" in e][:1]:
        apart = entry["divergence"]
        tiles.append(
            Tile(
                f"KL from the dense model, {text_name(entry)}",
                plus_minus(apart["kl_mean"], apart["kl_stderr"]),
                f"same top token {apart['top1_agreement']:.1%}",
                f"median {number(apart['kl_median'])}, 99 % of tokens below {number(apart['kl_p99'])} nats",
            )
        )
    for task, metrics in list(report["tasks"].items())[:TASKS_SHOWN]:
        metric, score = next(iter(metrics.items()))
        tiles.append(
            Tile(
                f"{task}, {metric}",
                plus_minus(score["after"] - score["before"], score["paired_stderr"], signed=True),
                f"{number(score['before'])} → {number(score['after'])}",
                "difference ± its paired error",
            )
        )
    return tiles
