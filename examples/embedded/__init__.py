"""What the examples share: a small world, a policy built on the spot, and what is done with its values."""
