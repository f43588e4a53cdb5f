"""What `gift annotate` is made of: batches as large as the memory allows, and unfinished work."""
