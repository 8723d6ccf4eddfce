"""What lets a trainer train iteration after iteration: swapped datasets, checkpoints, snapshots of the policy."""
