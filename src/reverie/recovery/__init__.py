"""Everything between placing quantizers and the finished integer model: ranges, rounding, and winning accuracy back."""
