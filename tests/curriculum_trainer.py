"""Trainers whose curriculum differs from the default one, which moves too slowly for a test of a few steps."""

from trl_entropy import DrGRPOTrainer


def with_curriculum(pass_reward=1.0, **buckets):
    """A trainer class; `buckets`: arguments of `PassRateSampler`."""

    class Trainer(DrGRPOTrainer):
        def _new_sampler(self):
            return super()._new_sampler(**buckets)

    Trainer.pass_reward = pass_reward
    return Trainer
