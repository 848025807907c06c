"""Model families: what each has of its own, a page each. `models.decoder` computes them all."""
