"""Training students from a feature store.

`build_learners` makes the students and their methods, `run.TrainingRun` takes a step of all of them, and
`trainer.Trainer` is the loop around it; sampler, batches, checkpoints and logs are files of their own.
"""
