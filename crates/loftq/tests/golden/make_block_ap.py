"""Some steps of Block-AP's training of one layer, from the formulas of EfficientQAT (arXiv:2407.11062) and its
published `UniformAffineQuantizer`, by PyTorch's autograd and AdamW. Writes block_ap.json."""

import json
import math
from pathlib import Path

import torch

D_IN, D_OUT, GROUP, BITS = 20, 6, 8, 2
N_BATCHES, BATCH, ROUNDS = 4, 10, 3
OF_GRIDS, OF_WEIGHTS = 1e-2, 1e-2
SEED = 16
MAX = 2**BITS - 1


def through(values, rounded):
    return (rounded - values).detach() + values


def fake_quant(weight, scales, zeros):
    scales = scales.repeat_interleave(GROUP, 0)[:D_IN]
    zeros = through(zeros, zeros.round())
    zeros = through(zeros, zeros.clamp(0, MAX)).repeat_interleave(GROUP, 0)[:D_IN]
    steps = weight / scales
    codes = through(steps, steps.round()) + zeros
    # The ends of the range have a gradient, as they had from `clamp` in the versions of PyTorch that the paper
    # used, and have not in this one.
    is_within = (codes >= 0) & (codes <= MAX)
    codes = torch.where(is_within, codes, codes.detach().clamp(0, MAX))
    return (codes - zeros) * scales, codes


def main():
    torch.manual_seed(SEED)
    rounded = lambda values: (values * 1000).round() / 1000
    weight = rounded(torch.randn(D_IN, D_OUT) * 0.5)
    x = rounded(torch.randn(N_BATCHES, BATCH, D_IN))
    y = rounded(x @ weight + 0.1 * torch.randn(N_BATCHES, BATCH, D_OUT))
    scales, zeros = [], []
    for rows in weight.split(GROUP):
        low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
        scales.append((high - low) / MAX)
        # Not rounded, so that some of them are near to another whole number.
        zeros.append(-low / scales[-1])
    scales, zeros = torch.stack(scales), torch.stack(zeros)
    first = {"scales": scales.tolist(), "zeros": zeros.tolist()}
    first["codes"] = fake_quant(weight, scales, zeros)[1].int().tolist()

    trained = weight.clone().requires_grad_()
    scales.requires_grad_()
    zeros.requires_grad_()
    groups = [{"params": [scales, zeros], "lr": OF_GRIDS}, {"params": [trained], "lr": OF_WEIGHTS}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    n_steps = ROUNDS * N_BATCHES
    losses = []
    for step in range(n_steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
        for group, rate in zip(optimizer.param_groups, (OF_GRIDS, OF_WEIGHTS)):
            group["lr"] = rate / 20 + (rate - rate / 20) * cosine
        at = step % N_BATCHES
        output = x[at] @ fake_quant(trained, scales, zeros)[0]
        loss = torch.nn.functional.mse_loss(output, y[at])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # What keeps parameters in their ranges did nothing.
    assert (zeros >= 0).all() and (zeros <= MAX).all() and (scales > 1e-2).all()
    codes = fake_quant(trained, scales, zeros)[1].int()
    last = {"scales": scales.tolist(), "zeros": zeros.round().tolist(), "codes": codes.tolist()}
    changed = (codes != torch.tensor(first["codes"])).sum().item()
    moved = (zeros.round() != torch.tensor(first["zeros"]).round()).sum().item()
    print(f"{changed} codes and {moved} zeros changed; loss {losses[0]:.4f} to {losses[-1]:.4f}")
    file = {
        "torch": torch.__version__,
        "group_size": GROUP,
        "bits": BITS,
        "learning_rates": [OF_GRIDS, OF_WEIGHTS],
        "weight": weight.tolist(),
        "x": x.tolist(),
        "y": y.tolist(),
        "first": first,
        "losses": losses,
        "trained": trained.tolist(),
        "last": last,
    }
    short = lambda value: (
        [short(one) for one in value] if isinstance(value, list)
        else {key: short(one) for key, one in value.items()} if isinstance(value, dict)
        else float(f"{value:.7g}") if isinstance(value, float) else value
    )
    out = Path(__file__).with_name("block_ap.json")
    out.write_text(json.dumps(short(file), separators=(",", ":")) + "\n")


main()
