"""Block-sparse attention for long prompts: selectors and the function that uses them."""
