"""Every model over several seeds under one protocol: which runs, running them, and what they show together."""
