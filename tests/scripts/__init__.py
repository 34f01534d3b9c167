"""Scripts: what a stranger runs, from bench/ and examples/."""
