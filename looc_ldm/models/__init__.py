"""Networks: the autoencoder with its quantizer, UNets, and what loads and scales them."""
