"""Several processes, one disk: who writes, who waits, how sharded weights become whole, how files survive a kill."""
