"""The two trainers, and what only training needs: data, losses, checkpoints."""
