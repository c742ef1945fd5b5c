"""Losses as pure tensor functions, one module for each shape of data. They know no model and no batch.

Nothing is averaged here: a loss comes back per token or per comparison, and the training loop divides the sum by
the count over the whole accumulated batch, so that batch 1 x accumulation 8 equals 8 x 1.
"""
