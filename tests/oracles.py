"""Slow and plain forms that tests compare with."""

import torch

SHAPES = {"wide": (12, 20), "tall": (20, 12)}


def truncated(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def close(edit, wanted, within=2e-5):
    torch.testing.assert_close(edit.dense().double(), wanted, rtol=0, atol=within * float(wanted.abs().max()))


def mean_square(rows):
    return float(rows.square().sum(1).mean())


def data_of(model, ids):
    """x (tokens, in) and dL/dy (tokens, out) of every Linear of the blocks, by autograd over the whole model."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":

            def keep(module, args, out, name=name):
                out.retain_grad()
                found[name] = args[0].detach(), out

            hooks.append(module.register_forward_hook(keep))
    (model(ids, labels=ids, use_cache=False).loss * (len(ids) * (ids.shape[1] - 1))).backward()
    for hook in hooks:
        hook.remove()
    return {name: (x.flatten(0, 1), out.grad.flatten(0, 1).double()) for name, (x, out) in found.items()}


def rank_beside_a_bias(shape, rank, storage):
    """The largest rank that together with a bias stores at most what `rank` stores without; 0 if there is none."""
    most = numbers_by_hand(shape, rank, storage, False)
    return max((k for k in range(1, rank + 1) if numbers_by_hand(shape, k, storage, True) <= most), default=0)


def numbers_by_hand(shape, rank, storage, bias):
    out, inner = shape
    return rank * (out + inner) - (rank * rank if storage == "pifa" else 0) + (out if bias else 0)
