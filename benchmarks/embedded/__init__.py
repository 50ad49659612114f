"""How the embedded model was made: its corpus, its training loop, its report."""
