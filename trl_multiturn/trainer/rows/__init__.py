"""What trainers do with rows before the first step: token columns, and the reference's log-probabilities."""
