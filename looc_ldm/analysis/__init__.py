"""A look inside an autoencoder, and beside others: what the commands `analyze` and `compare` compute and draw."""
