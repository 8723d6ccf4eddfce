"""What trainers on trajectories with an outcome share, with or without a value model: rows, loss seam and metrics."""
