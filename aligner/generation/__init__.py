"""Writing answers: sampling, prefill and decode with a cache, and the loop that keeps all rows of a batch busy."""
