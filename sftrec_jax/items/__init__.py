"""Items in tokens: distinct titles, and the code (a short token sequence) that names each item to the language model."""
