"""
The published losses of Clip-Cov and KL-Cov on one micro-batch, token by token in Python's floats.

Written from what PRIME-RL/Entropy-Mechanism-of-RL, verl/trainer/ppo/core_algos.py, computes (at 6071b11): the mean
over tokens of max(-r A, -clip(r) A), 0 for Clip-Cov's tokens; of -r A, plus coefficient |log r| for KL-Cov's.
"""

import math


class PublishedLoss:
    """Of rows of log-probabilities (new, old), one advantage a row, and a mask; lists, all of equal width."""

    def __init__(self, logps, old_logps, advantages, mask):
        self.places = [(i, k) for i, row in enumerate(mask) for k, inside in enumerate(row) if inside]
        self.logp = {(i, k): logps[i][k] for i, k in self.places}
        self.log_ratio = {(i, k): logps[i][k] - old_logps[i][k] for i, k in self.places}
        self.advantage = {(i, k): advantages[i] for i, k in self.places}
        mean_logp = math.fsum(self.logp.values()) / len(self.places)
        mean_advantage = math.fsum(self.advantage.values()) / len(self.places)
        self.covariance = {
            place: (self.logp[place] - mean_logp) * (self.advantage[place] - mean_advantage) for place in self.places
        }

    def clipped(self, place, epsilon):
        ratio = math.exp(self.log_ratio[place])
        limited = min(max(ratio, 1 - epsilon), 1 + epsilon)
        return -self.advantage[place] * limited > -self.advantage[place] * ratio

    def clip_cov_candidates(self, bounds, epsilon):
        inside = {place for place in self.places if bounds[0] < self.covariance[place] < bounds[1]}
        return {place for place in inside if not self.clipped(place, epsilon)}

    def clip_cov_count(self, ratio, bounds, epsilon):
        return min(max(int(ratio * len(self.places)), 1), len(self.clip_cov_candidates(bounds, epsilon)))

    def clip_cov_gradient(self, chosen, epsilon):
        """Of the loss, with respect to each token's log-probability."""
        without = {place for place in self.places if place in chosen or self.clipped(place, epsilon)}
        return {place: 0.0 if place in without else self._policy_gradient(place) for place in self.places}

    def kl_cov_tokens(self, percent):
        largest = sorted(self.places, key=lambda place: -self.covariance[place])
        return set(largest[: max(1, int(len(self.places) * percent / 100))])

    def kl_cov_gradient(self, percent, coefficient):
        """Of the loss, with respect to each token's log-probability; the ratio is not clipped."""
        gradient = {place: self._policy_gradient(place) for place in self.places}
        for place in self.kl_cov_tokens(percent):
            sign = (self.log_ratio[place] > 0) - (self.log_ratio[place] < 0)
            gradient[place] += coefficient * sign / len(self.places)
        return gradient

    def _policy_gradient(self, place):
        return -self.advantage[place] * math.exp(self.log_ratio[place]) / len(self.places)
