"""What was read before, beside a model: memories of tokens, each a distribution of the next token, and how they are mixed."""
