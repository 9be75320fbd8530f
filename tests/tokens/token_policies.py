"""Random policies, prompts and settings that tests of the token policies share."""

from __future__ import annotations

import torch

from methods.tokens.transformer import Shape, Transformer

SMALL = Shape(19, 32, 2, 4, 2, 48, context=64, qkv_bias=True)


def policy(shape: Shape = SMALL, seed: int = 0, loud: float = 12.0) -> Transformer:
    """A random policy; `loud` times the usual weights, so that what it says depends on what it read."""
    torch.manual_seed(seed)
    model = Transformer(shape)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(loud) if p.dim() == 2 and "embed" not in name else p.add_(0.1 * torch.randn_like(p))
    return model


def prompts(n: int, width: int, vocabulary: int, padded: bool = True):
    ids = torch.randint(1, vocabulary, (n, width))
    lengths = torch.randint(1, width + 1, (n,)) if padded else torch.full((n,), width)
    mask = torch.arange(width) >= width - lengths[:, None]
    return ids * mask, mask


CASES = {
    "plain": {}, "one sample": {"group": 1}, "greedy": {"temperature": 0.0}, "hot": {"temperature": 1.7},
    "nucleus": {"top_p": 0.7}, "adjusted": {"adjust": lambda logits: 0.5 + logits.std(-1, keepdim=True)},
    "one token": {"steps": 1}, "long": {"steps": 40},
}


@torch.no_grad()
def assert_drawn_rightly(model, out, prompt, mask, *, group, eos, pad, uniforms, temperature=1.0, top_p=1.0, adjust=None,
                         tolerance=1e-4, **_):
    """Every token of `out` is the one that its uniform number means, by a full forward over what was said before it, up to
    rounding; so are its log-probability and its row's end. For vocabularies so large that two ways of adding up
    probabilities often differ in a token, after which rows have nothing in common."""
    prompt, mask = prompt.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
    for row in range(len(prompt)):
        said, heard = out.response[row], int(out.mask[row].sum())
        ends = (said == eos).nonzero().flatten()
        assert heard == (int(ends[0]) + 1 if len(ends) and eos != pad else heard) and (said[heard:] == pad).all()
        assert not out.mask[row, heard:].any() and not out.log_prob[row, heard:].any()
        words = prompt[row][mask[row]]
        logits = model.logits(torch.cat([words, said[:heard]]).unsqueeze(0))[0, len(words) - 1:-1]
        heat = 1.0 if temperature == 0 else temperature if adjust is None else adjust(logits)
        p, token = (logits / heat).double().softmax(-1), said[:heard].unsqueeze(-1)
        if temperature == 0:
            assert (p.gather(-1, token) >= p.amax(-1, keepdim=True) - tolerance).all()
        if top_p < 1:
            ranked = p.sort(-1, descending=True).values
            last = (ranked.cumsum(-1) < top_p - 1e-6).sum(-1, keepdim=True)
            assert (p.gather(-1, token) >= ranked.gather(-1, last) - tolerance).all()
            continue
        if temperature:
            above, u = p.cumsum(-1).gather(-1, token), uniforms[row, :heard].unsqueeze(-1)
            assert (u < above + tolerance).all() and (u > above - p.gather(-1, token) - tolerance).all()
        log_p = p.gather(-1, token).log().squeeze(-1)
        torch.testing.assert_close(out.log_prob[row, :heard].double(), log_p, atol=1e-3, rtol=0)
