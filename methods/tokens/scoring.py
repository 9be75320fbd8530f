import torch
def log_prob_and_entropy(logits, target):
    lp = logits.log_softmax(-1)
    return {"log_prob": lp.gather(-1, target[:, None]).squeeze(-1), "entropy": -(lp.exp() * lp).sum(-1)}
def score(policy, prompt, prompt_mask, response, mask, measure, temperature=1.0, chunk=0):
    ids = torch.cat([prompt, response], 1); m = torch.cat([prompt_mask, mask], 1)
    h = policy.hidden(ids, m)[:, prompt.shape[1]-1:-1]
    logits = (h[mask] @ policy.head.T).float() / temperature
    out = measure(logits, response[mask])
    return {k: torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, v) for k, v in out.items()}
