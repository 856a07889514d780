"""From files or a dataset of the Hub to packed blocks: documents -> examples -> batches."""
