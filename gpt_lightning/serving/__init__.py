"""Models behind HTTP: rows that share decoding steps, and OpenAI's completions endpoint. Lightning is not imported."""
