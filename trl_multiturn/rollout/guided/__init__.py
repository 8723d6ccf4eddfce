"""What surrounds a guided search: its settings, and the rows that it leaves to train on."""
