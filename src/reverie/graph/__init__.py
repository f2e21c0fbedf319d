"""A network as one captured graph: capturing, rewriting, reading and executing it, and placing quantizers on it."""
