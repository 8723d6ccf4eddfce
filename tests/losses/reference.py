"""
The losses once more, in plain Python floats: loops over lists of actions, and gradients derived by hand.

Nothing here uses a mask, a tensor or automatic differentiation; each function takes one row's *actions* as lists and
returns `(loss, gradient)`.
"""

from __future__ import annotations


def oreo(values, log_ratios, reward, beta, steps):
    """Eqs. 8–10; `steps` lists (first, stop) ranges. Returns loss, dV of the value loss, dlog of the policy loss."""
    n = len(values)
    loss, d_values, d_log_ratios = 0.0, [0.0] * n, [0.0] * n
    for first, stop in steps:
        residual = values[first] - reward
        for i in range(first, n):
            residual += beta * log_ratios[i]
        loss += residual**2 / len(steps)
        d_values[first] += 2 * residual / len(steps)
        for i in range(first, stop):
            d_log_ratios[i] += 2 * beta * residual / len(steps)
    return loss, d_values, d_log_ratios


def n_step_return(values, log_ratios, rewards, beta, t, n):
    """Eq. 3.10."""
    total = values[t + n] if t + n < len(values) else 0.0
    for l in range(n):
        total += rewards[t + l] - beta * log_ratios[t + l]
    return total


def lambda_return(values, log_ratios, rewards, beta, lam, t, literal=False):
    """Eq. 3.11: all n-step returns, the last of which carries the remaining weight unless `literal`."""
    horizon = len(values) - t
    if lam == 1.0:
        return n_step_return(values, log_ratios, rewards, beta, t, horizon)
    total = 0.0
    for n in range(1, horizon + 1):
        weight = (1 - lam) * lam ** (n - 1)
        if n == horizon and not literal:
            weight = lam ** (n - 1)
        total += weight * n_step_return(values, log_ratios, rewards, beta, t, n)
    return total


def dqo(values, log_ratios, rewards, beta, lam, weight):
    """Eqs. 3.12 and 3.13. Returns value loss, dV, policy loss, dlog."""
    n = len(values)
    returns = [lambda_return(values, log_ratios, rewards, beta, lam, t) for t in range(n)] + [0.0]
    value_loss, policy_loss, d_values, d_log_ratios = 0.0, 0.0, [], []
    for t in range(n):
        value_loss += weight * (returns[t] - values[t]) ** 2
        d_values.append(-2 * weight * (returns[t] - values[t]))
        residual = beta * log_ratios[t] - (rewards[t] + returns[t + 1] - values[t])
        policy_loss += weight * residual**2
        d_log_ratios.append(2 * weight * beta * residual)
    return value_loss, d_values, policy_loss, d_log_ratios
