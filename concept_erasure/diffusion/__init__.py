"""Closed-form erasure for text-to-image models: what reads the text is edited, images are never needed."""
