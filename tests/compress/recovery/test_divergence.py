"""The divergence of a student from the teacher's likeliest tokens, against loops in float64."""

import math

import pytest
import torch

from paredown.compress.recovery.divergence import LEAST_REST, POSITIONS, divergence, mean_divergence, top_k


def slowly(student, teacher, k, loss, temperature, share=1.0):
    """One number for each row of logits (rows, vocabulary), over k tokens and the rest."""
    found = []
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p, q = (softmax([x / temperature for x in row]) for row in (t, s))
        order = sorted(range(len(t)), key=lambda i: -t[i])[:k]
        events = [(p[i], q[i]) for i in order]
        events.append(tuple(max(1 - sum(e[n] for e in events), LEAST_REST) for n in (0, 1)))
        between = [b ** (1 - share) * a**share for a, b in events]
        events = [(a / sum(between), b) for a, (_, b) in zip(between, events, strict=True)]
        forward = sum(a * math.log(a / b) for a, b in events)
        reverse = sum(b * math.log(b / a) for a, b in events)
        found.append({"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[loss] * temperature**2)
    return torch.tensor(found)


def softmax(row):
    exponentials = [math.exp(x - max(row)) for x in row]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("loss", ["forward", "reverse", "mixed"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_formula(loss, temperature):
    student, teacher = (2 * torch.randn(2, 7, 30)).unbind()
    target = top_k(teacher, 5, temperature).flat(torch.device("cpu"))
    wanted = slowly(student, teacher, 5, loss, temperature)
    torch.testing.assert_close(divergence(student, target, loss, temperature), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["forward", "reverse", "mixed"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_target_may_lie_between_student_and_teacher(loss, share):
    student, teacher = (2 * torch.randn(2, 7, 30)).unbind()
    target = top_k(teacher, 5, 1.5).flat(torch.device("cpu"))
    wanted = slowly(student, teacher, 5, loss, 1.5, share)
    torch.testing.assert_close(divergence(student, target, loss, 1.5, share), wanted, rtol=1e-4, atol=1e-5)


def test_no_gradient_comes_through_the_target():
    student, teacher = torch.randn(2, 6, 12).double().unbind()
    student.requires_grad_()
    divergence(student, top_k(teacher, 12).flat(torch.device("cpu")), share=0.4).sum().backward()
    between = (0.6 * student.detach() + 0.4 * teacher).softmax(-1)  # the paper's: of interpolated logits
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - between, rtol=1e-4, atol=1e-5)


def test_with_all_tokens_it_is_the_whole_divergence():
    student, teacher = torch.randn(2, 9, 12).unbind()
    found = divergence(student, top_k(teacher, 64).flat(torch.device("cpu")))
    whole = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(found, whole.sum(-1), rtol=1e-4, atol=2e-5)


def test_a_student_that_is_the_teacher_is_at_zero():
    logits = torch.randn(4, 20)
    assert divergence(logits, top_k(logits, 3).flat(torch.device("cpu"))).abs().max() < 1e-6


def test_parts_of_the_positions_give_the_mean_and_its_gradient():
    student, teacher = torch.randn(2, 2, POSITIONS // 2 + 30, 8).unbind()
    student.requires_grad_()
    target = top_k(teacher, 4)
    mean = mean_divergence(student, target)
    mean.backward()
    again = student.detach().flatten(0, 1).requires_grad_()
    divergence(again, target.flat(again.device)).mean().backward()
    torch.testing.assert_close(student.grad.flatten(0, 1), again.grad)
