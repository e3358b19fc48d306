"""What a report says of the training of a compressed model and of adapters, in lines for a screen and a card."""

from paredown.evaluation.schema import AdapterMerge, RecoveryStep, Report, TextComparison
from paredown.evaluation.tables import base_name


def recovery_lines(report: Report) -> list[str]:
    """A line for each step and each adapter, and one for each text with the compressed model's score; often none."""
    steps = [_step(step) for step in report.get("recovery", [])]
    steps += [line for adapter in report.get("adapters", []) for line in _adapter(adapter)]
    return [*steps, *(_text(text) for text in report["evaluation"] if "compressed" in text)]


def _step(step: RecoveryStep) -> str:
    remarks = "".join(f"; {remark}" for remark in step["remarks"])
    came = f"{step['before']:.4f} -> {step['after']:.4f}"
    if step["step"] == "reconstruct":
        found = f"mean error of the blocks {came} of the dense ones' variance"
    else:
        found = f"divergence on held-out text {came} nats after {step['best_tokens']:,} tokens"
    text = f" of {_named(step['text']['corpus'])}" if "text" in step else ""
    return (
        f"Recovery: {step['step']}, {step['trained']:,} numbers on {step['tokens']:,} tokens{text}{_choice(step)} towards "
        f"{base_name(step['teacher'])}{_ways(step)}; {found}; ended because {step['stopped']}{remarks}"
    )


def _named(corpora: str) -> str:
    return " + ".join(base_name(name) for name in corpora.split(" + "))


def _choice(step: RecoveryStep) -> str:
    """Which of the windows were trained on."""
    if "choice" not in step:
        return ""
    own = step["choice"]
    return (
        f" ({own['rows']} of {own['candidates']} windows, where the divergence was {own['chosen_divergence']:.4f}; of all "
        f"{own['divergence']:.4f})"
    )


def _ways(step: RecoveryStep) -> str:
    """What was asked for beside the dense model's probabilities."""
    settings = step["settings"]
    ways = [f"hidden states at weight {hidden['weight']:g}"] if (hidden := settings.get("hidden")) else []
    ways += ["an interpolated teacher"] if settings.get("taid") else []
    ways += ["8-bit Adam"] if settings.get("optimizer") == "adamw8bit" else []
    return f" with {', '.join(ways)}" if ways else ""


def _adapter(merge: AdapterMerge) -> list[str]:
    """What was merged, and for each kind of layer how much of the update the form of the weights left out."""
    count = sum(part["layers"] for part in merge["parts"])
    lines = [f"Adapter: {base_name(merge['adapter'])} was merged into {count} layers"]
    for part in merge["parts"]:
        written = f"{part['written']:.1%} with the rounding to the weights' dtype"
        how = "stored dense" if part["kind"] == "dense" else f"stored as {part['kind']}"
        lines.append(
            f"Adapter: {part['part']}, {part['layers']} layers {how}: of the update's norm {part['lost']:.1%} were left out "
            f"to keep the form, {written}"
        )
    return lines


def _text(text: TextComparison) -> str:
    """How far the compression raised the log perplexity, and how far the recovery lowered it."""
    delta = text["recovered_delta"]
    error = "" if delta["stderr"] is None else f" ± {delta['stderr']:.4f}"
    return (
        f"{base_name(text['corpus'])}: perplexity {text['before']['token_perplexity']:.2f} dense, "
        f"{text['compressed']['token_perplexity']:.2f} compressed, {text['after']['token_perplexity']:.2f} recovered; "
        f"recovery changed its log by {delta['log_ratio']:+.4f}{error}"
    )
