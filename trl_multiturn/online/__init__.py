"""What the online loop rests on: how a run goes on after a stop, and how an engine samples from the trained policy."""
