"""What the model learns to undo, how images are drawn from it, and the noise of both."""
