"""Parts of `gift annotate`: batches that fit into memory, and files of unfinished work."""
