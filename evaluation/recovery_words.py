"""What a report says of the training of a compressed model, in lines for a screen and a card."""

from paredown.evaluation.schema import RecoveryStep, Report, TextComparison
from paredown.evaluation.tables import base_name


def recovery_lines(report: Report) -> list[str]:
    """A line for each step, and one for each text with the compressed model's score; nothing without a recovery."""
    steps = [_step(step) for step in report.get("recovery", [])]
    return [*steps, *(_text(text) for text in report["evaluation"] if "compressed" in text)]


def _step(step: RecoveryStep) -> str:
    remarks = "".join(f"; {remark}" for remark in step["remarks"])
    came = f"{step['before']:.4f} -> {step['after']:.4f}"
    if step["step"] == "reconstruct":
        found = f"mean error of the blocks {came} of the dense ones' variance"
    else:
        found = f"divergence on held-out text {came} nats after {step['best_tokens']:,} tokens"
    return (
        f"Recovery: {step['step']}, {step['trained']:,} numbers on {step['tokens']:,} tokens towards "
        f"{base_name(step['teacher'])}; {found}; ended because {step['stopped']}{remarks}"
    )


def _text(text: TextComparison) -> str:
    """How far the compression raised the log perplexity, and how far the recovery lowered it."""
    delta = text["recovered_delta"]
    error = "" if delta["stderr"] is None else f" ± {delta['stderr']:.4f}"
    return (
        f"{base_name(text['corpus'])}: perplexity {text['before']['token_perplexity']:.2f} dense, "
        f"{text['compressed']['token_perplexity']:.2f} compressed, {text['after']['token_perplexity']:.2f} recovered; "
        f"recovery changed its log by {delta['log_ratio']:+.4f}{error}"
    )
