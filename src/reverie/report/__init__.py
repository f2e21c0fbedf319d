"""What a run measured: the numbers, and the page that shows them."""
