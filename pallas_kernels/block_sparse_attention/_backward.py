"""The gradient of block-sparse attention, over the same lists."""
