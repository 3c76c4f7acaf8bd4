"""Training: losses, distillation, data and the loop around them."""
