"""What the methods must equal: the papers' solves, layer by layer, and numbers from the authors' code."""
