"""From a file or Hub dataset to fixed-shape NumPy batches: sources -> formatters -> templates (+ media) -> layout -> loader."""
