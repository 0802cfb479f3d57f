"""Figures of one autoencoder (`looc-ldm analyze`) and comparison of several (`looc-ldm compare`)."""
