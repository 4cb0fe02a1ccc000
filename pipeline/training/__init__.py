"""Training students: sampler, batches, learner, trainer, checkpoints, logs."""
